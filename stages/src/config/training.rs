//! What the supervised loops of `sft` and `reward` have in common.

use super::check::Checker;

/// How long to train, in what portions, and when to evaluate and save. The sections `[sft]` and `[reward]` spell these out
/// as their own keys; this is what their loops read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Training {
    /// Passes over the data.
    pub epochs: usize,
    /// Stop after this many optimizer steps, however many the epochs would be.
    pub max_steps: Option<u64>,
    /// Sequences (for a reward model: pairs) that make one optimizer step.
    pub rows_per_step: usize,
    /// Most tokens in one forward pass. Changes memory and speed, not results.
    pub tokens_per_micro_batch: usize,
    /// Probability of dropping an activation.
    pub dropout: f64,
    /// Whether activations are computed again in the backward pass instead of being kept.
    pub recompute: bool,
    /// Steps between evaluations on held-out rows; 0: only at the end.
    pub eval_every: u64,
    /// Steps between checkpoints; 0: only at the end and when stopped.
    pub checkpoint_every: u64,
    /// How many checkpoints are kept.
    pub keep_last: usize,
}

impl Training {
    /// Optimizer steps in all, for `rows` training rows. The last step of an epoch may be smaller than the others.
    pub fn steps(&self, rows: usize) -> u64 {
        let per_epoch = rows.div_ceil(self.rows_per_step.max(1)) as u64;
        let steps = per_epoch * self.epochs as u64;
        self.max_steps.map_or(steps, |most| most.min(steps))
    }

    pub(super) fn check(&self, section: &str, rows: &str, max_tokens: usize, check: &mut Checker) {
        let key = |name: &str| format!("{section}.{name}");
        check.at_least(&key("epochs"), self.epochs, 1);
        if self.max_steps == Some(0) {
            check.fail(&key("max_steps"), "is 0; it must be at least 1, or be left out");
        }
        check.at_least(&key(rows), self.rows_per_step, 1);
        check_micro_batch(&key("tokens_per_micro_batch"), self.tokens_per_micro_batch, max_tokens, check);
        check.below_one(&key("dropout"), self.dropout);
        check_keep_last(&key("keep_last"), self.keep_last, check);
    }
}

/// A micro-batch must hold the longest sequence.
pub(super) fn check_micro_batch(key: &str, tokens: usize, max_tokens: usize, check: &mut Checker) {
    if tokens < max_tokens {
        check.fail(
            key,
            format_args!("is {tokens}; it must hold at least one sequence of data.max_tokens = {max_tokens}"),
        );
    }
}

/// One checkpoint is none: if the newest is damaged there must be an older one.
pub(super) fn check_keep_last(key: &str, keep_last: usize, check: &mut Checker) {
    if keep_last < 2 {
        check.fail(key, format_args!("is {keep_last}; keep at least 2, so that there is one to fall back to"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_count_the_short_ones() {
        let training = Training {
            epochs: 3,
            max_steps: None,
            rows_per_step: 4,
            tokens_per_micro_batch: 8,
            dropout: 0.0,
            recompute: false,
            eval_every: 0,
            checkpoint_every: 0,
            keep_last: 2,
        };
        assert_eq!(training.steps(9), 9);
        assert_eq!(training.steps(8), 6);
        assert_eq!(Training { max_steps: Some(5), ..training }.steps(9), 5);
        assert_eq!(Training { max_steps: Some(50), ..training }.steps(9), 9);
    }
}
