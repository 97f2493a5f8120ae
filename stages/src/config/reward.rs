//! `[reward]`: reward modelling.

use serde::{Deserialize, Serialize};

use super::check::Checker;
use super::optimizer::OptimizerConfig;
use super::training::Training;

/// `[reward]`. The loss is the pairwise logistic one of Bradley and Terry: `−log σ(r(chosen) − r(rejected) − margin)`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RewardConfig {
    /// The model whose weights are the start; left out: the SFT model of the same pipeline, or else `[model]`.
    pub init: Option<String>,
    /// `[reward.pairs]`: where pairs come from.
    pub pairs: PairsConfig,
    /// Whether the loss asks for the row's margin between the scores (Touvron et al., Llama 2, 2023, equation 2). The margin
    /// is the row's `margin` field or, for pairs made from ratings, `margin_scale` times the gap between the ratings.
    pub margin: bool,
    /// Score difference asked for per point of rating.
    pub margin_scale: f64,
    /// Weight of `(r(chosen) + r(rejected))²`, which keeps the scores of pairs around zero (Eisenstein et al., 2023).
    pub centring: f64,
    /// Passes over the pairs.
    pub epochs: usize,
    /// Stop after this many optimizer steps, however many the epochs would be.
    pub max_steps: Option<u64>,
    /// Pairs that make one optimizer step.
    pub pairs_per_step: usize,
    /// Most tokens in one forward pass. Changes memory and speed, not results.
    pub tokens_per_micro_batch: usize,
    /// Probability of dropping an activation.
    pub dropout: f64,
    /// Compute activations again in the backward pass instead of keeping them: less memory, a third more work.
    pub recompute: bool,
    /// Steps between evaluations on held-out pairs; 0: only at the end.
    pub eval_every: u64,
    /// Steps between checkpoints; 0: only at the end and when stopped.
    pub checkpoint_every: u64,
    /// How many checkpoints are kept, at least 2.
    pub keep_last: usize,
    /// `[reward.optimizer]`.
    pub optimizer: OptimizerConfig,
}

/// `[reward.pairs]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PairsConfig {
    /// What a pair is made of.
    pub source: PairSource,
    /// With ratings: the ratings of a pair differ by more than this.
    pub min_gap: f64,
    /// With ratings: in how many pairs each text is the first member, an opponent permitting.
    pub per_text: usize,
}

/// What a pair is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PairSource {
    /// The `chosen` and `rejected` of one row.
    Rows,
    /// Two rows with a `text` and a `rating` each.
    Ratings,
}

impl Default for PairsConfig {
    fn default() -> Self {
        Self { source: PairSource::Rows, min_gap: 2.0, per_text: 4 }
    }
}

impl Default for RewardConfig {
    fn default() -> Self {
        Self {
            init: None,
            pairs: PairsConfig::default(),
            margin: false,
            margin_scale: 1.0,
            centring: 0.0,
            epochs: 1,
            max_steps: None,
            pairs_per_step: 32,
            tokens_per_micro_batch: 4096,
            dropout: 0.0,
            recompute: false,
            eval_every: 100,
            checkpoint_every: 200,
            keep_last: 2,
            optimizer: OptimizerConfig { learning_rate: 5e-5, ..OptimizerConfig::default() },
        }
    }
}

impl RewardConfig {
    /// What the training loop reads.
    pub fn training(&self) -> Training {
        Training {
            epochs: self.epochs,
            max_steps: self.max_steps,
            rows_per_step: self.pairs_per_step,
            tokens_per_micro_batch: self.tokens_per_micro_batch,
            dropout: self.dropout,
            recompute: self.recompute,
            eval_every: self.eval_every,
            checkpoint_every: self.checkpoint_every,
            keep_last: self.keep_last,
        }
    }

    pub(super) fn check(&self, max_tokens: usize, check: &mut Checker) {
        self.training().check("reward", "pairs_per_step", max_tokens, check);
        check.not_negative("reward.pairs.min_gap", self.pairs.min_gap);
        check.at_least("reward.pairs.per_text", self.pairs.per_text, 1);
        check.not_negative("reward.margin_scale", self.margin_scale);
        check.not_negative("reward.centring", self.centring);
        self.optimizer.check("reward.optimizer", check);
    }
}
