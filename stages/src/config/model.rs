//! `[model]` and `[tokenizer]`: what is trained, and how text becomes tokens.

use serde::{Deserialize, Serialize};
use tandem_engine::model::spec::ModelSpec;

use super::check::Checker;

/// `[model]`: exactly one of `path` and `[model.new]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    /// A Hugging Face folder, a GGUF file, or a hub id like `HuggingFaceTB/SmolLM2-135M-Instruct`.
    pub path: Option<String>,
    /// A model with random weights, to be trained from nothing.
    pub new: Option<NewModelConfig>,
    /// The shape of the model at `path`, so that `--dry-run` needs none of its files; nothing else reads it.
    pub shape: Option<ShapeConfig>,
}

/// `[model.shape]`: what a Llama-like model at `path` looks like.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShapeConfig {
    /// Number of tokens.
    pub vocab_size: usize,
    /// Width of the hidden state.
    pub hidden: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Query heads per block.
    pub heads: usize,
    /// Key-value heads per block.
    pub kv_heads: usize,
    /// Width of the MLP.
    pub mlp_width: usize,
    /// Longest sequence in tokens.
    pub max_positions: usize,
    /// Whether the embedding serves as the head too.
    pub tie_embeddings: bool,
}

impl ShapeConfig {
    /// The shape as that of a new model.
    fn model(&self) -> NewModelConfig {
        NewModelConfig {
            hidden: self.hidden,
            layers: self.layers,
            heads: self.heads,
            kv_heads: Some(self.kv_heads),
            mlp_width: self.mlp_width,
            max_positions: self.max_positions,
            tie_embeddings: self.tie_embeddings,
            ..NewModelConfig::default()
        }
    }

    /// The model.
    pub fn spec(&self) -> ModelSpec {
        self.model().spec(self.vocab_size)
    }
}

/// `[model.new]`: the shape of a Llama-like model (RMS norm, rotary positions, gated SiLU MLP, grouped heads, no biases).
/// Its vocabulary is the tokenizer's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NewModelConfig {
    /// Width of the hidden state.
    pub hidden: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Query heads per block.
    pub heads: usize,
    /// Key-value heads per block, a divisor of `heads`; left out: as many as `heads`.
    pub kv_heads: Option<usize>,
    /// Width of a head, even; left out: `hidden / heads`.
    pub head_width: Option<usize>,
    /// Width of the MLP.
    pub mlp_width: usize,
    /// Longest sequence in tokens.
    pub max_positions: usize,
    /// Base of the rotary frequencies.
    pub rope_base: f64,
    /// Added to the mean square under the root of the norms.
    pub norm_epsilon: f64,
    /// Standard deviation of the initial weights.
    pub init_std: f64,
    /// Whether the embedding serves as the head too.
    pub tie_embeddings: bool,
}

impl Default for NewModelConfig {
    fn default() -> Self {
        Self {
            hidden: 256,
            layers: 4,
            heads: 4,
            kv_heads: None,
            head_width: None,
            mlp_width: 704,
            max_positions: 512,
            rope_base: 10_000.0,
            norm_epsilon: 1e-5,
            init_std: 0.02,
            tie_embeddings: true,
        }
    }
}

impl NewModelConfig {
    /// Key-value heads per block.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads.unwrap_or(self.heads)
    }

    /// Width of a head.
    pub fn head_width(&self) -> usize {
        self.head_width.unwrap_or(self.hidden / self.heads.max(1))
    }

    fn check(&self, section: &str, check: &mut Checker) {
        /// Far above any model there is; products of sizes stay far from overflow.
        const MAX_SIZE: usize = 1 << 20;
        let key = |name: &str| format!("{section}.{name}");
        for (name, value) in [
            ("hidden", self.hidden),
            ("layers", self.layers),
            ("heads", self.heads),
            ("kv_heads", self.kv_heads()),
            ("head_width", self.head_width()),
            ("mlp_width", self.mlp_width),
            ("max_positions", self.max_positions),
        ] {
            if !(1..=MAX_SIZE).contains(&value) {
                check.fail(&key(name), format_args!("is {value}; it must lie between 1 and {MAX_SIZE}"));
            }
        }
        if self.head_width.is_none() && self.heads > 0 && !self.hidden.is_multiple_of(self.heads) {
            check.fail(
                &key("heads"),
                format_args!("is {}, which does not divide hidden = {}; or give head_width", self.heads, self.hidden),
            );
        }
        if !self.head_width().is_multiple_of(2) {
            check.fail(
                &key("head_width"),
                format_args!("is {}; rotary positions need an even width", self.head_width()),
            );
        }
        if self.kv_heads() > 0 && !self.heads.is_multiple_of(self.kv_heads()) {
            check.fail(
                &key("kv_heads"),
                format_args!("is {}, which does not divide heads = {}", self.kv_heads(), self.heads),
            );
        }
        check.positive("rope_base", self.rope_base);
        check.positive("norm_epsilon", self.norm_epsilon);
        check.positive("init_std", self.init_std);
    }
}

impl ModelConfig {
    /// `needed`: whether a stage starts from this model whatever else is given.
    pub(super) fn check(&self, needed: bool, check: &mut Checker) {
        if needed || self.path.is_some() {
            check.exactly_one("model", &["`model.path`", "`[model.new]`"], &[self.path.is_some(), self.new.is_some()]);
        }
        if self.path.as_deref() == Some("") {
            check.fail("model.path", "is empty; name a folder, a GGUF file or a hub id");
        }
        if let Some(shape) = &self.shape {
            if self.path.is_none() {
                check.fail("model.shape", "is given without `model.path`; a new model has its own shape");
            }
            check.at_least("model.shape.vocab_size", shape.vocab_size, 1);
            shape.model().check("model.shape", check);
        }
        if let Some(new) = &self.new {
            new.check("model.new", check);
        }
    }
}

/// `[tokenizer]`: left out, it is the one in the model's folder.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TokenizerConfig {
    /// A folder with `tokenizer.json`, or a hub id.
    pub path: Option<String>,
    /// A byte-level BPE tokenizer trained on the SFT texts.
    pub train: Option<TrainTokenizerConfig>,
}

/// `[tokenizer.train]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainTokenizerConfig {
    /// Number of tokens, special ones included.
    pub vocab_size: usize,
    /// How often a pair must occur to be merged.
    pub min_frequency: u64,
    /// Whether texts begin with the end-of-text token as well, so that their first token too is predicted from something.
    pub begin_with_bos: bool,
}

impl Default for TrainTokenizerConfig {
    fn default() -> Self {
        Self { vocab_size: 4096, min_frequency: 2, begin_with_bos: true }
    }
}

impl TokenizerConfig {
    pub(super) fn check(&self, model: &ModelConfig, check: &mut Checker) {
        if self.path.is_some() && self.train.is_some() {
            check.fail("tokenizer", "has both `path` and `[tokenizer.train]`; keep one");
        }
        if model.new.is_some() && self.path.is_none() && self.train.is_none() {
            check.fail("tokenizer", "is needed for a new model: give `tokenizer.path` or `[tokenizer.train]`");
        }
        if model.path.is_some() && self.train.is_some() {
            check.fail("tokenizer.train", "does not fit `model.path`: a trained model keeps its own tokenizer");
        }
        if let Some(train) = &self.train {
            // One token for each byte, and the end of text.
            check.at_least("tokenizer.train.vocab_size", train.vocab_size, 257);
        }
    }
}
