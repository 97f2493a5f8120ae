//! Strict reading of a `config.json`: each key has a type, a range and the default of transformers' configuration class.

use std::path::Path;

use serde_json::{Map, Value};
use tandem_kernels::mlp::Activation;

use crate::{Error, Result};

/// Largest size that a dimension of a model may have; keeps every product of dimensions far from overflow.
const DIMENSION_LIMIT: u64 = 1 << 24;
/// Most blocks that a model may have.
const LAYER_LIMIT: usize = 4_096;
/// Longest sequence that a model may accept; its rotary table is made when it is loaded.
const POSITION_LIMIT: usize = 1 << 20;

/// The fields of one `config.json`.
pub(super) struct Config<'a> {
    path: &'a Path,
    fields: &'a Map<String, Value>,
}

impl<'a> Config<'a> {
    /// The fields of the object `config`, which was read from `path`.
    pub(super) fn new(path: &'a Path, config: &'a Value) -> Result<Self> {
        match config {
            Value::Object(fields) => Ok(Self { path, fields }),
            _ => Err(Error::model_file(path, "it is not a JSON object", "get the folder's config.json anew")),
        }
    }

    /// The nested object `key`, if there is one.
    pub(super) fn object(&self, key: &str) -> Result<Option<Config<'a>>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(fields)) => Ok(Some(Config { path: self.path, fields })),
            Some(other) => Err(self.wrong(key, "an object", other)),
        }
    }

    /// The value of `key`; `null` counts as absent, as it does for transformers.
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.fields.get(key).filter(|value| !value.is_null())
    }

    /// Whether `key` stands there, be it `null`.
    pub(super) fn has(&self, key: &str) -> bool {
        self.fields.contains_key(key)
    }

    /// A dimension: a whole number from 1.
    pub(super) fn size(&self, key: &str, default: usize) -> Result<usize> {
        Ok(self.size_if_any(key)?.unwrap_or(default))
    }

    /// A dimension that may be absent.
    pub(super) fn size_if_any(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64() {
            Some(size) if (1..=DIMENSION_LIMIT).contains(&size) => Ok(Some(size as usize)),
            _ => Err(self.wrong(key, &format!("a whole number from 1 to {DIMENSION_LIMIT}"), value)),
        }
    }

    /// The number of blocks.
    pub(super) fn layers(&self, key: &str, default: usize) -> Result<usize> {
        match self.size(key, default)? {
            layers if layers <= LAYER_LIMIT => Ok(layers),
            layers => Err(self.refuse(format!("{key} is {layers}; at most {LAYER_LIMIT} are supported"))),
        }
    }

    /// The longest sequence.
    pub(super) fn positions(&self, key: &str, default: usize) -> Result<usize> {
        match self.size(key, default)? {
            positions if positions <= POSITION_LIMIT => Ok(positions),
            positions => Err(self.refuse(format!("{key} is {positions}; at most {POSITION_LIMIT} are supported"))),
        }
    }

    /// A number above zero.
    pub(super) fn positive(&self, key: &str, default: f64) -> Result<f64> {
        Ok(self.positive_if_any(key)?.unwrap_or(default))
    }

    /// A number above zero that may be absent.
    pub(super) fn positive_if_any(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64() {
            Some(number) if number.is_finite() && number > 0.0 => Ok(Some(number)),
            _ => Err(self.wrong(key, "a number above 0", value)),
        }
    }

    /// A probability below one.
    pub(super) fn probability(&self, key: &str, default: f64) -> Result<f32> {
        let Some(value) = self.get(key) else { return Ok(default as f32) };
        match value.as_f64() {
            Some(number) if (0.0..1.0).contains(&number) => Ok(number as f32),
            _ => Err(self.wrong(key, "a probability below 1", value)),
        }
    }

    /// A yes or no.
    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(self.wrong(key, "true or false", other)),
        }
    }

    /// A text.
    pub(super) fn text(&self, key: &str, default: &'a str) -> Result<&'a str> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::String(text)) => Ok(text),
            Some(other) => Err(self.wrong(key, "a text", other)),
        }
    }

    /// An activation by its name in transformers.
    pub(super) fn activation(&self, key: &str, default: &'static str) -> Result<Activation> {
        match self.text(key, default)? {
            "silu" | "swish" => Ok(Activation::Silu),
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Ok(Activation::GeluTanh),
            "gelu" => Ok(Activation::GeluErf),
            "relu" => Ok(Activation::Relu),
            other => Err(self.refuse(format!("{key} is {other:?}; supported: silu, gelu, gelu_new, relu"))),
        }
    }

    /// Insists that a flag whose other value changes the maths has the value that is computed.
    pub(super) fn require(&self, key: &str, wanted: bool) -> Result<()> {
        match self.flag(key, wanted)? {
            flag if flag == wanted => Ok(()),
            flag => Err(self.refuse(format!("{key} is {flag}, which is not supported"))),
        }
    }

    /// Query and key-value heads and the head width: `hidden / heads` unless `head_dim` says otherwise.
    pub(super) fn grouped_heads(&self, hidden: usize, defaults: (usize, Option<usize>)) -> Result<Heads> {
        let query = self.size("num_attention_heads", defaults.0)?;
        // `null` means one key-value head per query head; an absent key means the class's default.
        let default = if self.has("num_key_value_heads") { query } else { defaults.1.unwrap_or(query) };
        let key_value = self.size("num_key_value_heads", default)?;
        if !query.is_multiple_of(key_value) {
            return Err(self.refuse(format!(
                "num_attention_heads ({query}) is not a multiple of num_key_value_heads ({key_value})"
            )));
        }
        let width = match self.size_if_any("head_dim")? {
            Some(width) => width,
            None => self.head_dim("hidden_size", hidden, "num_attention_heads", query)?,
        };
        if !width.is_multiple_of(2) {
            return Err(self.refuse(format!("head_dim is {width}; rotary positions need an even one")));
        }
        if (query * width) as u64 > DIMENSION_LIMIT {
            return Err(self.refuse(format!("{query} heads of width {width} are more than {DIMENSION_LIMIT} columns")));
        }
        Ok(Heads { query, key_value, width })
    }

    /// `hidden / heads`, which must be whole.
    pub(super) fn head_dim(&self, hidden_key: &str, hidden: usize, heads_key: &str, heads: usize) -> Result<usize> {
        if hidden.is_multiple_of(heads) {
            Ok(hidden / heads)
        } else {
            Err(self.refuse(format!("{hidden_key} ({hidden}) is not a multiple of {heads_key} ({heads})")))
        }
    }

    /// A model that cannot be computed here.
    pub(super) fn refuse(&self, reason: impl Into<String>) -> Error {
        Error::model_file(self.path, reason, "choose a model without it, or correct the file if it is wrong")
    }

    fn wrong(&self, key: &str, wanted: &str, got: &Value) -> Error {
        let mut shown = got.to_string();
        if let Some((end, _)) = shown.char_indices().nth(40) {
            shown.truncate(end);
            shown.push('…');
        }
        Error::model_file(self.path, format!("{key} must be {wanted}, it is {shown}"), "correct it")
    }
}

/// Heads of an attention.
pub(super) struct Heads {
    /// Query heads, H.
    pub(super) query: usize,
    /// Key-value heads, K.
    pub(super) key_value: usize,
    /// Head width, D.
    pub(super) width: usize,
}

/// The name of an activation in transformers.
pub(super) fn activation_name(activation: Activation) -> &'static str {
    match activation {
        Activation::Silu => "silu",
        Activation::GeluTanh => "gelu_new",
        Activation::GeluErf => "gelu",
        Activation::Relu => "relu",
    }
}

/// The shortest decimal that is this f32, so that 0.1 is written as 0.1.
pub(crate) fn shortest(value: f32) -> f64 {
    // What `to_string` writes for a float can be parsed.
    value.to_string().parse().unwrap_or(f64::from(value))
}
