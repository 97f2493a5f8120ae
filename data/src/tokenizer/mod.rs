//! Text to token ids and back.
//!
//! What holds here, whatever the model: nothing is ever padded or truncated; text from data never turns into control tokens,
//! even if it spells one; a prompt and its response are tokenised apart, so the prompt's ids in training are the very ids
//! that generation starts from; and the end-of-sequence token is a real token that is appended to be learnt.

mod check;
mod dialogue;
mod files;
mod merges;
mod special;
mod stream;
mod train;

use std::collections::BTreeSet;
use std::path::Path;

use tokenizers::Tokenizer as HfTokenizer;

use crate::error::{DataError, Result};
use crate::limits;
use crate::template::{ChatTemplate, TemplateTokens};

pub use dialogue::Encoded;
pub use files::TokenizerFiles;
pub use special::SpecialTokens;
pub use stream::StreamDecoder;
pub use train::{BpeTraining, END_OF_TEXT};

/// A model's tokenizer with its special tokens and its chat template.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    origin: String,
    /// Reads the spelling of a special token as that token: for text that templates write.
    control: HfTokenizer,
    /// Reads the same spelling as ordinary text: for everything that comes from data.
    literal: HfTokenizer,
    special: SpecialTokens,
    control_ids: BTreeSet<u32>,
    prefix: Vec<u32>,
    vocab_size: usize,
    template: Option<ChatTemplate>,
    files: TokenizerFiles,
}

impl Tokenizer {
    /// Loads the tokenizer of a model folder: `tokenizer.json`, and, where they are there, `tokenizer_config.json`,
    /// `special_tokens_map.json`, `generation_config.json`, `config.json` and `chat_template.jinja`.
    ///
    /// # Errors
    /// Missing or damaged files, a vocabulary that contradicts itself, no end-of-sequence token, a broken template.
    pub fn load(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        Self::from_files(folder.display().to_string(), TokenizerFiles::read(folder)?)
    }

    /// The tokenizer that the given files make. `origin` names them in messages.
    ///
    /// # Errors
    /// As [`Tokenizer::load`].
    pub fn from_files(origin: impl Into<String>, files: TokenizerFiles) -> Result<Self> {
        let origin = origin.into();
        let wrong = |reason: String| DataError::Tokenizer { origin: origin.clone(), reason };
        check::patterns(files.tokenizer()).map_err(wrong)?;
        let mut control = HfTokenizer::from_bytes(files.tokenizer())
            .map_err(|error| wrong(format!("tokenizer.json cannot be used: {error}")))?;
        // The file may ask for both; packed batches need neither, and a cut text is a silent loss.
        control.with_padding(None);
        control.with_truncation(None).map_err(|error| wrong(error.to_string()))?;
        check::added_tokens(&control, files.tokenizer()).map_err(wrong)?;
        let mut literal = control.clone();
        literal.set_encode_special_tokens(true);

        let special = SpecialTokens::resolve(&files, &control).map_err(wrong)?;
        let added = control.get_added_tokens_decoder();
        // The unknown token is what honest text becomes where the vocabulary has no letters for it.
        let mut control_ids: BTreeSet<u32> =
            added.iter().filter(|(id, token)| token.special && special.unk != Some(**id)).map(|(&id, _)| id).collect();
        control_ids.extend(special.ids());
        let vocab_size = control.get_vocab(true).into_values().max().map_or(0, |largest| largest as usize + 1);
        let prefix = prefix(&control).map_err(wrong)?;
        let tokens = template_tokens(&control, &special);
        let template = files.template().map_err(wrong)?;
        let template = template.map(|(name, source)| ChatTemplate::new(format!("{origin}/{name}"), source, tokens));
        let template = template.transpose()?;
        Ok(Self { origin, control, literal, special, control_ids, prefix, vocab_size, template, files })
    }

    /// Ids run from 0 to one below this. A model's embedding must have at least as many rows.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Fails if the tokenizer has ids for which a model with `rows` embedding rows has none.
    ///
    /// # Errors
    /// Says both numbers.
    pub fn check_fits(&self, rows: usize) -> Result<()> {
        if self.vocab_size <= rows {
            return Ok(());
        }
        let reason = format!(
            "it has ids up to {}, but the model has {rows} embedding rows; they do not belong together",
            self.vocab_size - 1
        );
        Err(self.wrong(reason))
    }

    /// The special tokens.
    pub fn special(&self) -> &SpecialTokens {
        &self.special
    }

    /// The token that ends a response.
    pub fn eos(&self) -> u32 {
        self.special.eos
    }

    /// Every token after which generation stops; [`Tokenizer::eos`] is one of them.
    pub fn stop_ids(&self) -> &[u32] {
        &self.special.stop
    }

    /// The ids put before a text that is not written by a template: the begin-of-sequence token of models that have been
    /// trained with one, else nothing.
    pub fn prefix(&self) -> &[u32] {
        &self.prefix
    }

    /// The chat template, if the model has one.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// Uses another chat template than the model's own, or none: then prompts are plain text. The files that
    /// [`Tokenizer::files`] gives change accordingly.
    ///
    /// # Errors
    /// The template does not compile.
    pub fn set_template(&mut self, origin: &str, source: Option<&str>) -> Result<()> {
        let tokens = template_tokens(&self.control, &self.special);
        self.template = source.map(|source| ChatTemplate::new(origin, source, tokens)).transpose()?;
        self.files.set_template(source)
    }

    /// The ids of a text from data. No id is that of a control token.
    ///
    /// # Errors
    /// The text is too long, or spells a control token in a way the vocabulary cannot spell otherwise.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let ids = encode_with(&self.literal, text)?;
        if let Some(&id) = ids.iter().find(|id| self.control_ids.contains(id)) {
            let token = self.control.id_to_token(id).unwrap_or_default();
            let reason = format!("it contains the control token {token:?}; remove it from the text");
            return Err(DataError::Text { text: beginning(text), reason });
        }
        Ok(ids)
    }

    /// The text of ids; special tokens are left out.
    ///
    /// # Errors
    /// Only if the tokenizer's own decoder fails. Unknown ids decode to nothing.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.control.decode(ids, true).map_err(|error| self.wrong(format!("cannot decode: {error}")))
    }

    /// A decoder for ids that arrive one at a time.
    pub fn stream(&self) -> StreamDecoder<'_> {
        StreamDecoder::new(self)
    }

    /// The string of one token as the vocabulary has it, special or not.
    pub fn token(&self, id: u32) -> Option<String> {
        self.control.id_to_token(id)
    }

    /// The id of a token as the vocabulary has it, special or not.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.control.token_to_id(token)
    }

    /// The files to publish beside a model that uses this tokenizer. What was loaded comes back byte for byte.
    pub fn files(&self) -> &TokenizerFiles {
        &self.files
    }

    fn wrong(&self, reason: String) -> DataError {
        DataError::Tokenizer { origin: self.origin.clone(), reason }
    }
}

fn encode_with(tokenizer: &HfTokenizer, text: &str) -> Result<Vec<u32>> {
    let fail = |reason: String| DataError::Text { text: beginning(text), reason };
    if text.len() > limits::TEXT_BYTES {
        return Err(fail(format!("it has {} bytes, more than the {} allowed", text.len(), limits::TEXT_BYTES)));
    }
    let encoding = tokenizer.encode_fast(text, false).map_err(|error| fail(error.to_string()))?;
    Ok(encoding.get_ids().to_vec())
}

fn beginning(text: &str) -> String {
    const SHOWN: usize = 60;
    let mut shown: String = text.chars().take(SHOWN).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    shown
}

/// What the tokenizer's own post-processor puts before a text, which tells whether the model expects a BOS token.
fn prefix(tokenizer: &HfTokenizer) -> Result<Vec<u32>, String> {
    let ids = |special| tokenizer.encode_fast("a", special).map(|encoding| encoding.get_ids().to_vec());
    let (bare, with) = (ids(false).map_err(|e| e.to_string())?, ids(true).map_err(|e| e.to_string())?);
    let start = with.windows(bare.len().max(1)).position(|window| window == bare).unwrap_or(0);
    Ok(with[..start].to_vec())
}

fn template_tokens(tokenizer: &HfTokenizer, special: &SpecialTokens) -> TemplateTokens {
    let text = |id: Option<u32>| id.and_then(|id| tokenizer.id_to_token(id)).unwrap_or_default();
    TemplateTokens {
        bos: text(special.bos),
        eos: text(Some(special.eos)),
        unk: text(special.unk),
        pad: text(special.pad),
    }
}
