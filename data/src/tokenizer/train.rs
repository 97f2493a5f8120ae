//! Training a byte-level BPE tokenizer, in the format that Hugging Face libraries load.

use std::collections::BTreeMap;

use serde_json::json;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{
    AddedToken, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, Tokenizer as HfTokenizer,
};

use super::files::TokenizerFiles;
use super::{Tokenizer, merges};
use crate::error::{DataError, Result};

/// The one special token of a trained tokenizer: ends every text and, if asked for, begins it.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// How to train a tokenizer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BpeTraining {
    /// Number of tokens; fewer come out if the corpus is too small for so many.
    pub vocab_size: usize,
    /// A pair must occur so often to be merged.
    pub min_frequency: u64,
    /// Whether texts begin with [`END_OF_TEXT`] as well, so that their first token too is predicted from something.
    pub begin_with_bos: bool,
}

impl Default for BpeTraining {
    fn default() -> Self {
        Self { vocab_size: 4_096, min_frequency: 2, begin_with_bos: true }
    }
}

/// The special token and the 256 byte characters.
const SMALLEST_VOCAB: usize = 257;

impl BpeTraining {
    /// Learns from texts. The order of the texts does not matter, nor do threads or hash seeds: the same texts give the same
    /// bytes.
    ///
    /// # Errors
    /// A vocabulary smaller than the bytes, or no text at all.
    pub fn train<S: AsRef<str>>(&self, texts: impl IntoIterator<Item = S>) -> Result<Tokenizer> {
        let wrong = |reason: String| DataError::Tokenizer { origin: "to be trained".into(), reason };
        if self.vocab_size < SMALLEST_VOCAB {
            let reason = format!(
                "vocab_size = {} is below {SMALLEST_VOCAB}, one token per byte and {END_OF_TEXT}",
                self.vocab_size
            );
            return Err(wrong(reason));
        }
        let library = |error: tokenizers::Error| wrong(error.to_string());
        let splitter = ByteLevel::new(false, true, true);
        let mut words = BTreeMap::new();
        for text in texts {
            let mut pieces = PreTokenizedString::from(text.as_ref());
            splitter.pre_tokenize(&mut pieces).map_err(library)?;
            for (word, _, _) in pieces.get_splits(OffsetReferential::Original, OffsetType::None) {
                *words.entry(word.to_owned()).or_insert(0u64) += 1;
            }
        }
        if words.is_empty() {
            return Err(wrong("there is no text to learn from".into()));
        }
        let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
        alphabet.sort_unstable();
        let mut tokens = vec![END_OF_TEXT.to_owned()];
        tokens.extend(alphabet.into_iter().map(String::from));
        let learnt = merges::learn(&words, tokens, self.vocab_size, self.min_frequency);
        let tokenizer = self.assemble(&learnt).map_err(library)?;
        let json = tokenizer.to_string(true).map_err(library)?;
        let config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": false,
        });
        Tokenizer::from_files("trained", TokenizerFiles::new(json.into_bytes()).with_config(&config))
    }

    fn assemble(&self, learnt: &merges::Merges) -> tokenizers::Result<HfTokenizer> {
        let token = |id: u32| learnt.tokens[id as usize].clone();
        let vocab = learnt.tokens.iter().cloned().zip(0..).collect::<tokenizers::models::bpe::Vocab>();
        let merges = learnt.merges.iter().map(|&(left, right)| (token(left), token(right))).collect();
        let model = BPE::builder().vocab_and_merges(vocab, merges).build()?;
        let mut tokenizer = HfTokenizer::new(model);
        tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
        tokenizer.with_decoder(Some(ByteLevel::new(false, true, true)));
        if self.begin_with_bos {
            let begin = TemplateProcessing::builder()
                .try_single(format!("{END_OF_TEXT} $A"))?
                .special_tokens(vec![(END_OF_TEXT.to_owned(), 0)])
                .build()?;
            tokenizer.with_post_processor(Some(begin));
        } else {
            tokenizer.with_post_processor(Some(ByteLevel::new(false, true, true)));
        }
        tokenizer.add_special_tokens([AddedToken::from(END_OF_TEXT, true).normalized(false)])?;
        Ok(tokenizer)
    }
}
