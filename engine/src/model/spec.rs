//! What tells one model family from another: a table of facts, read by the one block that computes them all.

use serde::{Deserialize, Serialize};
use tandem_kernels::mlp::Activation;
use tandem_kernels::rope::RopeScaling;

/// Everything that the maths needs to know of a model. A family is a way to read one from a `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// Which names and config file the model has on disk.
    pub family: Family,
    /// Entries of the vocabulary, V.
    pub vocab_size: usize,
    /// Width of the residual stream, d.
    pub hidden: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Query heads, H.
    pub heads: usize,
    /// Key-value heads, K; divides H.
    pub kv_heads: usize,
    /// Head width, D.
    pub head_dim: usize,
    /// Width of the MLP, f.
    pub mlp_width: usize,
    /// Activation of the MLP.
    pub activation: Activation,
    /// Whether the MLP multiplies the activated gate with a second projection.
    pub gated: bool,
    /// Kind of norm.
    pub norm: NormKind,
    /// Added to the variance in a norm.
    pub norm_eps: f64,
    /// Norms after the residual sums instead of before the branches (OPT-350m); such models have no final norm.
    pub post_norm: bool,
    /// How tokens know where they are.
    pub positions: PositionKind,
    /// Longest sequence that the model accepts, tokens.
    pub max_positions: usize,
    /// Biases on the q, k and v projections.
    pub qkv_bias: bool,
    /// Bias on the output projection of the attention.
    pub output_bias: bool,
    /// Biases in the MLP.
    pub mlp_bias: bool,
    /// Sliding window of the attention, tokens (Mistral).
    pub window: Option<usize>,
    /// The head is the embedding itself.
    pub tied: bool,
    /// Width of the embedding where it differs from `hidden` (OPT-350m): two projections lead in and out.
    pub embedding_width: Option<usize>,
    /// Standard deviation of initial weights.
    pub init_std: f64,
    /// Dropout probability that the model's own configuration trains with.
    pub dropout: f32,
}

/// A family of models on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// `LlamaForCausalLM`: Llama, TinyLlama, SmolLM.
    Llama,
    /// `MistralForCausalLM`.
    Mistral,
    /// `Qwen2ForCausalLM`.
    Qwen2,
    /// `GPT2LMHeadModel`.
    Gpt2,
    /// `OPTForCausalLM`.
    Opt,
}

/// Kind of norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// Root mean square, a weight only.
    Rms,
    /// Mean and variance, a weight and a bias.
    Layer,
}

/// How tokens know where they are.
#[derive(Clone, Debug, PartialEq)]
pub enum PositionKind {
    /// Rotary embedding of queries and keys.
    Rotary {
        /// Base of the frequencies.
        theta: f64,
        /// Stretching of the frequencies for longer contexts.
        scaling: Option<RopeScaling>,
    },
    /// A learned vector per position; position `p` reads row `p + offset` (OPT: 2).
    Learned {
        /// First row in use.
        offset: usize,
    },
}

impl ModelSpec {
    /// Width of the embedding and of the rows that enter the head.
    pub fn embedding_width(&self) -> usize {
        self.embedding_width.unwrap_or(self.hidden)
    }

    /// Columns of the fused q, k, v projection, `(H + 2K) D`.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Columns of the first MLP projection: `2f` if gated, else `f`.
    pub fn up_width(&self) -> usize {
        if self.gated { 2 * self.mlp_width } else { self.mlp_width }
    }

    /// Rows of the table of learned positions, if there is one.
    pub fn position_rows(&self) -> Option<usize> {
        match self.positions {
            PositionKind::Learned { offset } => Some(self.max_positions + offset),
            PositionKind::Rotary { .. } => None,
        }
    }

    /// Whether a norm stands between the last block and the head.
    pub fn final_norm(&self) -> bool {
        !self.post_norm
    }
}
