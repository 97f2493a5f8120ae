//! The shapes that are measured, and the work of a step of each.

use clap::ValueEnum;
use tandem_engine::model::spec::{Family, ModelSpec, NormKind, PositionKind};
use tandem_kernels::mlp::Activation;

/// A Llama-shaped model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Shape {
    /// 128 wide, 4 layers, 4,096 tokens: 1.9 million parameters.
    Tiny,
    /// 256 wide, 8 layers, 8,192 tokens: 10.5 million parameters.
    Small,
    /// SmolLM2-135M.
    Smollm,
}

impl Shape {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Shape::Tiny => "tiny",
            Shape::Small => "small",
            Shape::Smollm => "smollm",
        }
    }

    /// The model.
    pub fn spec(self) -> ModelSpec {
        let llama = |hidden, layers, heads, kv_heads, head_dim, mlp_width, vocab_size| ModelSpec {
            family: Family::Llama,
            vocab_size,
            hidden,
            layers,
            heads,
            kv_heads,
            head_dim,
            mlp_width,
            activation: Activation::Silu,
            gated: true,
            norm: NormKind::Rms,
            norm_eps: 1e-5,
            post_norm: false,
            positions: PositionKind::Rotary { theta: 10_000.0, scaling: None },
            max_positions: 2048,
            qkv_bias: false,
            output_bias: false,
            mlp_bias: false,
            window: None,
            tied: false,
            embedding_width: None,
            init_std: 0.02,
            dropout: 0.0,
        };
        match self {
            Shape::Tiny => llama(128, 4, 4, 4, 32, 352, 4096),
            Shape::Small => llama(256, 8, 8, 8, 32, 688, 8192),
            Shape::Smollm => ModelSpec {
                tied: true,
                max_positions: 8192,
                positions: PositionKind::Rotary { theta: 100_000.0, scaling: None },
                ..llama(576, 30, 9, 3, 64, 1536, 49_152)
            },
        }
    }

    /// Sequences of a training step and their length.
    pub fn training_work(self) -> (usize, usize) {
        match self {
            Shape::Tiny | Shape::Small => (16, 256),
            Shape::Smollm => (4, 512),
        }
    }
}
