//! The files that make a tokenizer in a Hugging Face model folder, as bytes.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use crate::error::{DataError, Result};
use crate::limits;
use crate::sources::read_bounded;

/// Bytes by file name. Made from a folder, or by hand for models that keep their tokenizer elsewhere (GGUF).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizerFiles {
    tokenizer: Vec<u8>,
    side: BTreeMap<String, Vec<u8>>,
}

const TOKENIZER: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";
const SPECIAL_MAP: &str = "special_tokens_map.json";
const TEMPLATE: &str = "chat_template.jinja";
/// Read for the special tokens' ids; the model's own exporter writes them anew.
const MODEL_FILES: &[&str] = &["generation_config.json", "config.json"];
/// Travels along for tools that read them; not read here.
const COMPANIONS: &[&str] = &["added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "vocab.txt"];

impl TokenizerFiles {
    /// From the bytes of a `tokenizer.json` alone.
    pub fn new(tokenizer: Vec<u8>) -> Self {
        Self { tokenizer, side: BTreeMap::new() }
    }

    /// Adds `tokenizer_config.json`, with `bos_token`, `eos_token`, `chat_template` and the like.
    #[must_use]
    pub fn with_config(mut self, config: &Value) -> Self {
        self.side.insert(CONFIG.into(), pretty(config));
        self
    }

    /// Reads what is there of a model folder.
    pub(super) fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(TOKENIZER);
        if !path.is_file() {
            return Err(no_tokenizer(folder));
        }
        let mut files = Self::new(read_bounded(&path, "tokenizer.json, in bytes,", limits::TOKENIZER_BYTES)?);
        for name in [CONFIG, SPECIAL_MAP, TEMPLATE].iter().chain(MODEL_FILES).chain(COMPANIONS) {
            let path = folder.join(name);
            if path.is_file() {
                let limit = if COMPANIONS.contains(name) { limits::TOKENIZER_BYTES } else { limits::SIDE_FILE_BYTES };
                files.side.insert((*name).into(), read_bounded(&path, name, limit)?);
            }
        }
        Ok(files)
    }

    /// Name and bytes of every file to publish.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &[u8])> {
        let side = self.side.iter().filter(|(name, _)| !MODEL_FILES.contains(&name.as_str()));
        std::iter::once((TOKENIZER, self.tokenizer.as_slice()))
            .chain(side.map(|(name, bytes)| (name.as_str(), bytes.as_slice())))
    }

    /// Writes the files into an existing folder, each atomically.
    ///
    /// # Errors
    /// Those of the store.
    pub fn save(&self, folder: &Path) -> Result<()> {
        for (name, bytes) in self.iter() {
            let path = folder.join(name);
            tandem_store::atomic_write_file(&path, bytes).map_err(|error| DataError::Tokenizer {
                origin: folder.display().to_string(),
                reason: format!("{name} cannot be written: {error}"),
            })?;
        }
        Ok(())
    }

    /// The bytes of `tokenizer.json`.
    pub fn tokenizer(&self) -> &[u8] {
        &self.tokenizer
    }

    /// A side file as JSON; `Null` if it is not there.
    pub(super) fn json(&self, name: &str) -> Result<Value, String> {
        match self.side.get(name) {
            Some(bytes) => serde_json::from_slice(bytes).map_err(|error| format!("{name} is not JSON: {error}")),
            None => Ok(Value::Null),
        }
    }

    /// The chat template and the file it stands in. A template file wins over one in the config; of several in the config,
    /// the one named `default`.
    pub(super) fn template(&self) -> Result<Option<(&'static str, String)>, String> {
        if let Some(bytes) = self.side.get(TEMPLATE) {
            let text = std::str::from_utf8(bytes).map_err(|_| format!("{TEMPLATE} is not UTF-8"))?;
            return Ok(Some((TEMPLATE, text.to_owned())));
        }
        let config = self.json(CONFIG)?;
        let template = match &config["chat_template"] {
            Value::Null => None,
            Value::String(text) => Some(text.clone()),
            Value::Array(named) => {
                let default = named.iter().find(|entry| entry["name"] == "default");
                let text = default.and_then(|entry| entry["template"].as_str());
                Some(text.ok_or_else(|| format!("{CONFIG} has chat templates, but none named \"default\""))?.to_owned())
            }
            _ => return Err(format!("chat_template in {CONFIG} is neither a text nor a list")),
        };
        Ok(template.map(|text| (CONFIG, text)))
    }

    pub(super) fn set_template(&mut self, source: Option<&str>) -> Result<()> {
        self.side.remove(TEMPLATE);
        if let Some(source) = source {
            self.side.insert(TEMPLATE.into(), source.as_bytes().to_vec());
            return Ok(());
        }
        let config = self.json(CONFIG).map_err(|reason| DataError::Tokenizer { origin: CONFIG.into(), reason })?;
        if let Value::Object(mut fields) = config
            && fields.remove("chat_template").is_some()
        {
            self.side.insert(CONFIG.into(), pretty(&Value::Object(fields)));
        }
        Ok(())
    }
}

fn pretty(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

fn no_tokenizer(folder: &Path) -> DataError {
    let path = folder.join(TOKENIZER);
    let slow = ["tokenizer.model", "vocab.json"].into_iter().find(|name| folder.join(name).is_file());
    match slow {
        Some(name) => DataError::Tokenizer {
            origin: folder.display().to_string(),
            reason: format!(
                "there is {name} but no {TOKENIZER}; make one: python -c \"from transformers import AutoTokenizer as A; \
                 A.from_pretrained('{0}').save_pretrained('{0}')\"",
                folder.display()
            ),
        },
        None => DataError::io(&path, std::io::ErrorKind::NotFound.into()),
    }
}
