//! Which ids begin, end and pad a text.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokenizers::Tokenizer as HfTokenizer;

use super::files::TokenizerFiles;

/// The ids of the special tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpecialTokens {
    /// Begins a text, in models that use one.
    pub bos: Option<u32>,
    /// Ends a response.
    pub eos: u32,
    /// Every id that ends generation, `eos` first.
    pub stop: Vec<u32>,
    /// Named for other tools; no batch here is ever padded.
    pub pad: Option<u32>,
    /// Stands for what the vocabulary cannot spell.
    pub unk: Option<u32>,
}

impl SpecialTokens {
    /// Looks, in this order, into `tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json` and
    /// `config.json`.
    pub(super) fn resolve(files: &TokenizerFiles, tokenizer: &HfTokenizer) -> Result<Self, String> {
        let named = [files.json("tokenizer_config.json")?, files.json("special_tokens_map.json")?];
        let numbered = [files.json("generation_config.json")?, files.json("config.json")?];
        let find = |name: &str| -> Result<Option<u32>, String> {
            let key = format!("{name}_token");
            for config in &named {
                // A token is written as its text or as an object with its text.
                let text = config[&key].as_str().or_else(|| config[&key]["content"].as_str());
                if let Some(text) = text {
                    let id = tokenizer.token_to_id(text);
                    return id.map(Some).ok_or_else(|| format!("its {key} {text:?} is not in the vocabulary"));
                }
            }
            Ok(numbered.iter().find_map(|config| ids(&config[format!("{name}_token_id")]).first().copied()))
        };
        let (bos, eos, pad, unk) = (find("bos")?, find("eos")?, find("pad")?, find("unk")?);
        let eos = eos.ok_or(
            "no end-of-sequence token is named; add \"eos_token\" to tokenizer_config.json or \"eos_token_id\" to \
             generation_config.json",
        )?;
        let mut stop = vec![eos];
        for id in ids(&numbered[0]["eos_token_id"]) {
            if !stop.contains(&id) {
                stop.push(id);
            }
        }
        let special = Self { bos, eos, stop, pad, unk };
        let unknown = special.ids().find(|&id| tokenizer.id_to_token(id).is_none());
        match unknown {
            Some(id) => Err(format!("the special token id {id} is not in the vocabulary")),
            None => Ok(special),
        }
    }

    /// Those that no text may make: all but `unk`.
    pub(super) fn ids(&self) -> impl Iterator<Item = u32> + '_ {
        self.stop.iter().copied().chain(self.bos).chain(self.pad)
    }
}

/// One id or a list of ids.
fn ids(value: &Value) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(values) => values.iter().filter_map(id).collect(),
        value => id(value).into_iter().collect(),
    }
}
