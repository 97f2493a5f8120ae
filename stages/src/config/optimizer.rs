//! `[*.optimizer]`: what moves the weights, its schedule, and clipping.

use std::fmt;

use serde::{Deserialize, Serialize};
use tandem_engine::train::ScheduleKind;

use super::check::Checker;

/// An optimizer with warm-up and decay of the learning rate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// The method: `adamw`, or one that sends less between ranks.
    pub kind: OptimizerKind,
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
    /// `one_bit_adam`, `zero_one_adam`: steps after which the second moment stays as it is; left out: a fifth of all.
    pub freeze_steps: Option<u64>,
    /// `zero_one_adam`: the interval between updates of the second moment doubles after so many of them.
    pub variance_updates_per_interval: u64,
    /// `zero_one_adam`: the interval between exchanges doubles after so many steps.
    pub steps_per_local_interval: u64,
    /// `zero_one_adam`: most steps that a rank makes by itself between two exchanges.
    pub max_local_steps: u64,
}

/// How gradients of several ranks become one update.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerKind {
    /// AdamW (Loshchilov and Hutter, 2019) on the exact sum of the gradients.
    #[default]
    Adamw,
    /// 1-bit Adam (Tang et al., 2021): Adam for `freeze_steps`, then signs of the momentum with error feedback.
    OneBitAdam,
    /// 0/1 Adam (Lu et al., 2022): signs from the beginning, and steps without any exchange.
    ZeroOneAdam,
    /// Signs of the momentum, decided by majority (Bernstein et al., signSGD, 2018).
    SignSgd,
}

impl OptimizerKind {
    /// Whether ranks exchange less than their gradients.
    pub fn is_compressed(self) -> bool {
        self != OptimizerKind::Adamw
    }
}

impl fmt::Display for OptimizerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            OptimizerKind::Adamw => "adamw",
            OptimizerKind::OneBitAdam => "one_bit_adam",
            OptimizerKind::ZeroOneAdam => "zero_one_adam",
            OptimizerKind::SignSgd => "sign_sgd",
        })
    }
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            kind: OptimizerKind::default(),
            learning_rate: 1e-4,
            schedule: ScheduleKind::Cosine,
            warmup_fraction: 0.05,
            min_lr_ratio: 0.1,
            weight_decay: 0.0,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            clip_norm: 1.0,
            freeze_steps: None,
            variance_updates_per_interval: 16,
            steps_per_local_interval: 32_768,
            max_local_steps: 16,
        }
    }
}

impl OptimizerConfig {
    /// A constant rate, as is usual for PPO, where the number of useful steps is not known beforehand.
    pub(super) fn constant(learning_rate: f64) -> Self {
        Self { learning_rate, schedule: ScheduleKind::Constant, warmup_fraction: 0.0, ..Self::default() }
    }

    /// Steps after which the second moment stays as it is, in a run of `total_steps`.
    pub fn freeze_after(&self, total_steps: u64) -> u64 {
        self.freeze_steps.unwrap_or(total_steps / 5)
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
        let freezes = matches!(self.kind, OptimizerKind::OneBitAdam | OptimizerKind::ZeroOneAdam);
        if self.freeze_steps.is_some() && !freezes {
            let problem = format_args!(
                "is given, but `kind` is \"{}\", which never freezes; remove it or take \"one_bit_adam\"",
                self.kind
            );
            check.fail(&key("freeze_steps"), problem);
        }
        check.at_least(&key("variance_updates_per_interval"), self.variance_updates_per_interval, 1);
        check.at_least(&key("steps_per_local_interval"), self.steps_per_local_interval, 1);
        check.at_least(&key("max_local_steps"), self.max_local_steps, 1);
    }
}
