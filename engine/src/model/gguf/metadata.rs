//! The key-value part of a GGUF file, and the `config.json` that says the same.

use std::io::{Cursor, Read};
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{Content, Value as Field};
use serde_json::{Value, json};

use crate::model::families::shortest;
use crate::model::import::files::open;
use crate::{Error, Result};

/// Longest head of a file: metadata, vocabulary and the list of tensors. That of a vocabulary of 256,000 has 15 MB.
const HEAD_LIMIT: u64 = 32 << 20;

/// The head of a GGUF file.
pub(super) struct Head {
    pub(super) path: PathBuf,
    pub(super) file: std::fs::File,
    pub(super) content: Content,
}

impl Head {
    /// Reads the head of the file `path`.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let (file, length) = open(path)?;
        let wrong = |reason: String| Error::model_file(path, reason, "get the file anew");
        let mut head = Vec::new();
        (&file).take(HEAD_LIMIT).read_to_end(&mut head).map_err(|error| Error::io(path, error))?;
        // Reading from memory bounds every length that the file declares by what was read.
        let parsed = catch_unwind(|| Content::read(&mut Cursor::new(&head)));
        let content = parsed
            .map_err(|_| wrong("its header cannot be read".into()))?
            .map_err(|error| wrong(format!("its header is not valid: {error}")))?;
        if content.tensor_data_offset > length {
            return Err(wrong("it ends in its header".into()));
        }
        Ok(Self { path: path.to_path_buf(), file, content })
    }

    /// A field's value.
    pub(super) fn get(&self, key: &str) -> Option<&Field> {
        self.content.metadata.get(key)
    }

    /// A text.
    pub(super) fn text(&self, key: &str) -> Option<&str> {
        self.get(key).and_then(|field| field.to_string().ok()).map(String::as_str)
    }

    /// A whole number of any width.
    pub(super) fn whole(&self, key: &str) -> Option<u64> {
        match *self.get(key)? {
            Field::I8(n) => n.try_into().ok(),
            Field::I16(n) => n.try_into().ok(),
            Field::I32(n) => n.try_into().ok(),
            Field::I64(n) => n.try_into().ok(),
            ref field => field.to_u64().ok(),
        }
    }

    /// The elements of a list, as texts.
    pub(super) fn texts(&self, key: &str) -> Option<Vec<&str>> {
        let list = self.get(key)?.to_vec().ok()?;
        list.iter().map(|field| field.to_string().ok().map(String::as_str)).collect()
    }

    /// An error about the file as a whole.
    pub(super) fn refuse(&self, reason: impl Into<String>) -> Error {
        Error::model_file(&self.path, reason, "take the model's folder in the format of transformers")
    }

    fn number(&self, key: &str) -> Option<f64> {
        match *self.get(key)? {
            Field::F32(number) => Some(shortest(number)),
            Field::F64(number) => Some(number),
            _ => None,
        }
    }

    /// The `config.json` of the model.
    pub(super) fn config(&self) -> Result<Value> {
        let architecture = self.text("general.architecture").unwrap_or("");
        let key = |name: &str| format!("{architecture}.{name}");
        let size = |name: &str| {
            self.whole(&key(name)).map(|n| json!(n)).ok_or_else(|| self.refuse(format!("it lacks {}", key(name))))
        };
        let has = |name: &str| self.content.tensor_infos.contains_key(name);
        let embedding = self.content.tensor_infos.get("token_embd.weight");
        let vocab_size = embedding.and_then(|info| info.shape.dims().first().copied());
        let mut config = match architecture {
            "llama" | "qwen2" => {
                self.refuse_extras(architecture)?;
                let heads = size("attention.head_count")?;
                let epsilon = self.number(&key("attention.layer_norm_rms_epsilon"));
                let mut config = json!({
                    "hidden_size": size("embedding_length")?,
                    "num_hidden_layers": size("block_count")?,
                    "num_attention_heads": heads,
                    "num_key_value_heads": self.whole(&key("attention.head_count_kv")).map_or(heads, |n| json!(n)),
                    "head_dim": self.whole(&key("attention.key_length")),
                    "intermediate_size": size("feed_forward_length")?,
                    "max_position_embeddings": size("context_length")?,
                    "rms_norm_eps": epsilon.ok_or_else(|| self.refuse("it lacks the epsilon of its norms"))?,
                    "rope_theta": self.number(&key("rope.freq_base")).unwrap_or(10_000.0),
                    "tie_word_embeddings": !has("output.weight"),
                });
                if architecture == "llama" {
                    config["attention_bias"] = json!(has("blk.0.attn_q.bias"));
                    config["mlp_bias"] = json!(has("blk.0.ffn_up.bias"));
                }
                if let Some(factor) = self.number(&key("rope.scaling.factor")).filter(|&factor| factor != 1.0) {
                    config["rope_scaling"] = json!({ "rope_type": "linear", "factor": factor });
                }
                config
            }
            "gpt2" => json!({
                "n_embd": size("embedding_length")?,
                "n_layer": size("block_count")?,
                "n_head": size("attention.head_count")?,
                "n_inner": size("feed_forward_length")?,
                "n_positions": size("context_length")?,
                "layer_norm_epsilon": self.number(&key("attention.layer_norm_epsilon")),
            }),
            other => {
                return Err(self.refuse(format!("its architecture is {other:?}; supported are llama, qwen2, gpt2")));
            }
        };
        config["model_type"] = json!(architecture);
        config["vocab_size"] = json!(vocab_size);
        for (name, field) in [("bos", "bos"), ("eos", "eos"), ("pad", "padding")] {
            if let Some(id) = self.whole(&format!("tokenizer.ggml.{field}_token_id")) {
                config[format!("{name}_token_id")] = json!(id);
            }
        }
        Ok(config)
    }

    /// Refuses what the block does not compute.
    fn refuse_extras(&self, architecture: &str) -> Result<()> {
        let key = |name: &str| format!("{architecture}.{name}");
        if self.content.tensor_infos.contains_key("rope_freqs.weight") {
            return Err(self.refuse("it stretches its rotary frequencies by a stored table, which is not supported"));
        }
        let scaling = self.text(&key("rope.scaling.type")).unwrap_or("linear");
        if !["none", "linear"].contains(&scaling) {
            return Err(self.refuse(format!("rotary scaling {scaling:?} is not supported in a GGUF file")));
        }
        for name in ["expert_count", "attention.sliding_window"] {
            if let Some(count) = self.whole(&key(name)).filter(|&count| count > 0) {
                return Err(self.refuse(format!("{} is {count}, which is not supported", key(name))));
            }
        }
        Ok(())
    }
}
