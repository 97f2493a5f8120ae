//! From the configuration to the engine's own types.

use tandem_engine::model::spec::{Family, ModelSpec, NormKind, PositionKind};
use tandem_engine::train;
use tandem_kernels::mlp::Activation;

use super::model::NewModelConfig;
use super::optimizer::{OptimizerConfig, OptimizerKind};

impl OptimizerConfig {
    /// The engine's optimizer for a run of `total_steps` steps.
    pub fn build(&self, total_steps: u64) -> train::OptimizerConfig {
        let freeze_steps = self.freeze_after(total_steps).max(1);
        train::OptimizerConfig {
            kind: match self.kind {
                OptimizerKind::Adamw => train::OptimizerKind::AdamW,
                OptimizerKind::OneBitAdam => train::OptimizerKind::OneBitAdam { freeze_steps },
                OptimizerKind::ZeroOneAdam => train::OptimizerKind::ZeroOneAdam {
                    freeze_steps,
                    variance_updates_per_interval: self.variance_updates_per_interval,
                    steps_per_local_interval: self.steps_per_local_interval,
                    max_local_steps: self.max_local_steps,
                },
                OptimizerKind::SignSgd => train::OptimizerKind::SignSgd { error_feedback: true },
            },
            schedule: train::Schedule {
                kind: self.schedule,
                peak_lr: self.learning_rate,
                warmup_steps: (self.warmup_fraction * total_steps as f64).round() as u64,
                total_steps,
                min_ratio: self.min_lr_ratio,
            },
            beta1: self.beta1,
            beta2: self.beta2,
            eps: self.epsilon,
            weight_decay: self.weight_decay,
            max_grad_norm: self.clip_norm,
        }
    }
}

impl NewModelConfig {
    /// The model, for a vocabulary of `vocab_size` tokens.
    pub fn spec(&self, vocab_size: usize) -> ModelSpec {
        ModelSpec {
            family: Family::Llama,
            vocab_size,
            hidden: self.hidden,
            layers: self.layers,
            heads: self.heads,
            kv_heads: self.kv_heads(),
            head_dim: self.head_width(),
            mlp_width: self.mlp_width,
            activation: Activation::Silu,
            gated: true,
            norm: NormKind::Rms,
            norm_eps: self.norm_epsilon,
            post_norm: false,
            positions: PositionKind::Rotary { theta: self.rope_base, scaling: None },
            max_positions: self.max_positions,
            qkv_bias: false,
            output_bias: false,
            mlp_bias: false,
            window: None,
            tied: self.tie_embeddings,
            embedding_width: None,
            init_std: self.init_std,
            dropout: 0.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_warm_up_is_a_share_of_the_steps() {
        let config = OptimizerConfig { warmup_fraction: 0.1, learning_rate: 2.0, ..OptimizerConfig::default() };
        let built = config.build(50);
        assert_eq!(built.schedule.warmup_steps, 5);
        assert_eq!(built.schedule.lr(5), 2.0);
        assert!((built.schedule.lr(50) - 2.0 * config.min_lr_ratio).abs() < 1e-12);
    }
}
