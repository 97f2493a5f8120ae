//! `[sft]`: supervised fine-tuning.

use serde::{Deserialize, Serialize};

use super::check::Checker;
use super::optimizer::OptimizerConfig;
use super::training::Training;

/// `[sft]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SftConfig {
    /// Which tokens are learnt.
    pub loss: SftLoss,
    /// Passes over the data.
    pub epochs: usize,
    /// Stop after this many optimizer steps, however many the epochs would be.
    pub max_steps: Option<u64>,
    /// Sequences that make one optimizer step.
    pub sequences_per_step: usize,
    /// Most tokens in one forward pass. Changes memory and speed, not results.
    pub tokens_per_micro_batch: usize,
    /// Probability of dropping an activation.
    pub dropout: f64,
    /// Compute activations again in the backward pass instead of keeping them: less memory, a third more work.
    pub recompute: bool,
    /// Steps between evaluations on held-out rows; 0: only at the end.
    pub eval_every: u64,
    /// Steps between checkpoints; 0: only at the end and when stopped.
    pub checkpoint_every: u64,
    /// How many checkpoints are kept, at least 2.
    pub keep_last: usize,
    /// `[sft.optimizer]`.
    pub optimizer: OptimizerConfig,
}

/// Which tokens are learnt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SftLoss {
    /// Responses and the token that ends them; prompts are only read.
    Responses,
    /// Prompts too.
    Everything,
}

impl Default for SftConfig {
    fn default() -> Self {
        Self {
            loss: SftLoss::Responses,
            epochs: 1,
            max_steps: None,
            sequences_per_step: 32,
            tokens_per_micro_batch: 4096,
            dropout: 0.0,
            recompute: false,
            eval_every: 100,
            checkpoint_every: 200,
            keep_last: 2,
            optimizer: OptimizerConfig::default(),
        }
    }
}

impl SftConfig {
    /// What the training loop reads.
    pub fn training(&self) -> Training {
        Training {
            epochs: self.epochs,
            max_steps: self.max_steps,
            rows_per_step: self.sequences_per_step,
            tokens_per_micro_batch: self.tokens_per_micro_batch,
            dropout: self.dropout,
            recompute: self.recompute,
            eval_every: self.eval_every,
            checkpoint_every: self.checkpoint_every,
            keep_last: self.keep_last,
        }
    }

    pub(super) fn check(&self, max_tokens: usize, check: &mut Checker) {
        self.training().check("sft", "sequences_per_step", max_tokens, check);
        self.optimizer.check("sft.optimizer", check);
    }
}
