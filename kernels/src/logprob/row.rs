//! The log-sum-exp and entropy of one row of logits, in the order that every caller shares.

use crate::math::{LANES, exp, max, sum_lanes};
use crate::simd::{fma, simd_fn};

/// Entries that are summed together. Part of the order of arithmetic: changing it changes results.
pub(super) const BLOCK: usize = 512;

/// `Σ exp(l − max)` and `Σ exp(l − max)(l − max)` of the entries seen so far, and their maximum.
#[derive(Clone, Copy, Debug)]
pub(super) struct Partial {
    max: f32,
    sum: f64,
    moment: f64,
}

impl Partial {
    /// Nothing seen.
    pub(super) const EMPTY: Self = Self { max: f32::NEG_INFINITY, sum: 0.0, moment: 0.0 };

    /// Continues with entries that start at a multiple of [`BLOCK`].
    pub(super) fn extend(self, logits: &[f32]) -> Self {
        logits.chunks(BLOCK).fold(self, |seen, block| seen.merge(block_partial(block)))
    }

    /// Two parts of a row as one.
    fn merge(self, next: Self) -> Self {
        if self.sum == 0.0 {
            return next;
        }
        let max = self.max.max(next.max);
        let (a, b) = (self.rebased(max), next.rebased(max));
        Self { max, sum: a.sum + b.sum, moment: a.moment + b.moment }
    }

    /// The same sums relative to `max` instead of the part's own maximum.
    fn rebased(self, max: f32) -> Self {
        let shift = f64::from(self.max) - f64::from(max);
        let scale = shift.exp();
        Self { max, sum: scale * self.sum, moment: scale * (self.moment + shift * self.sum) }
    }

    /// The statistics of a row that has been seen whole.
    pub(super) fn finish(self) -> RowStats {
        let log_sum = self.sum.ln();
        RowStats {
            lse: (f64::from(self.max) + log_sum) as f32,
            entropy: (log_sum - self.moment / self.sum) as f32,
            max: self.max,
            log_sum,
        }
    }
}

/// What a row of logits says as a distribution.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowStats {
    /// log Σ exp of the logits.
    pub lse: f32,
    /// Entropy in nats.
    pub entropy: f32,
    /// The largest logit.
    pub max: f32,
    /// log Σ exp (logit − max): unlike `lse` it loses no digits to the size of the logits.
    log_sum: f64,
}

impl RowStats {
    /// Natural log-probability of an entry from its logit in this row.
    pub fn log_prob(&self, logit: f32) -> f32 {
        (f64::from(logit) - f64::from(self.max) - self.log_sum) as f32
    }
}

/// Statistics of one row of logits, bit for bit those of [`super::head_logprob`]. NaN and infinity make them NaN.
pub fn row_stats(logits: &[f32]) -> RowStats {
    Partial::EMPTY.extend(logits).finish()
}

simd_fn! { fn block_partial(logits: &[f32]) -> Partial = block_partial_body; }

#[inline(always)]
fn block_partial_body<const FMA: bool>(logits: &[f32]) -> Partial {
    let max = max(logits);
    let (mut sums, mut moments) = ([0f32; LANES], [0f32; LANES]);
    let (groups, rest) = logits.as_chunks::<LANES>();
    for group in groups {
        for lane in 0..LANES {
            let shifted = group[lane] - max;
            let e = exp::<FMA>(shifted);
            sums[lane] += e;
            moments[lane] = fma::<FMA>(e, shifted, moments[lane]);
        }
    }
    for (lane, &logit) in rest.iter().enumerate() {
        let shifted = logit - max;
        let e = exp::<FMA>(shifted);
        sums[lane] += e;
        moments[lane] = fma::<FMA>(e, shifted, moments[lane]);
    }
    Partial { max, sum: f64::from(sum_lanes(sums)), moment: f64::from(sum_lanes(moments)) }
}
