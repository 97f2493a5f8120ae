//! `[*.optimizer]`: AdamW, its schedule, and clipping.

use serde::{Deserialize, Serialize};
use tandem_engine::train::ScheduleKind;

use super::check::Checker;

/// AdamW (Loshchilov and Hutter, 2019) with warm-up and decay of the learning rate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// The highest learning rate, reached after the warm-up.
    pub learning_rate: f64,
    /// How it falls afterwards: `cosine`, `linear` or `constant` (not at all).
    pub schedule: ScheduleKind,
    /// Share of all steps in which it rises linearly from zero.
    pub warmup_fraction: f64,
    /// Where it ends, as a share of `learning_rate`.
    pub min_lr_ratio: f64,
    /// Decoupled weight decay of matrices; norms and biases are not decayed.
    pub weight_decay: f64,
    /// Decay of the running mean of the gradient.
    pub beta1: f64,
    /// Decay of the running mean of its square.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// The gradient is scaled down to this global norm if it is longer; 0: never.
    pub clip_norm: f64,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            learning_rate: 1e-4,
            schedule: ScheduleKind::Cosine,
            warmup_fraction: 0.05,
            min_lr_ratio: 0.1,
            weight_decay: 0.0,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            clip_norm: 1.0,
        }
    }
}

impl OptimizerConfig {
    /// A constant rate, as is usual for PPO, where the number of useful steps is not known beforehand.
    pub(super) fn constant(learning_rate: f64) -> Self {
        Self { learning_rate, schedule: ScheduleKind::Constant, warmup_fraction: 0.0, ..Self::default() }
    }

    pub(super) fn check(&self, section: &str, check: &mut Checker) {
        let key = |name: &str| format!("{section}.{name}");
        check.positive(&key("learning_rate"), self.learning_rate);
        check.fraction(&key("warmup_fraction"), self.warmup_fraction);
        check.fraction(&key("min_lr_ratio"), self.min_lr_ratio);
        check.not_negative(&key("weight_decay"), self.weight_decay);
        check.below_one(&key("beta1"), self.beta1);
        check.below_one(&key("beta2"), self.beta2);
        check.positive(&key("epsilon"), self.epsilon);
        check.not_negative(&key("clip_norm"), self.clip_norm);
    }
}
