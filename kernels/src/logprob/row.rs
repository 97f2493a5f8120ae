//! The log-sum-exp and entropy of one row of logits, in the order that every caller shares.

use crate::math::{LANES, exp_small, max, sum_lanes};
use crate::simd::{fma, simd_fn};

/// Entries that are summed together; a vocabulary is cut into shards at multiples of it.
///
/// Part of the order of arithmetic: changing it changes results.
pub const BLOCK: usize = 512;

/// What is known of a row after some of its entries: enough to join with the rest of the row on another rank.
///
/// `l` are the logits of the entries seen, the temperature already applied.
#[derive(Clone, Copy, Debug)]
pub struct HeadPartial {
    /// The largest `l`; −∞ if no entry was seen.
    pub max: f32,
    /// `Σ exp(l − max)`.
    pub sum: f64,
    /// `Σ exp(l − max)(l − max)`.
    pub moment: f64,
    /// The logit of the row's label; NaN if it is not among the entries seen.
    pub label_logit: f32,
}

impl HeadPartial {
    /// Nothing seen.
    pub const EMPTY: Self = Self { max: f32::NEG_INFINITY, sum: 0.0, moment: 0.0, label_logit: f32::NAN };

    /// Continues with entries that start at a multiple of [`BLOCK`].
    pub(super) fn extend(self, logits: &[f32]) -> Self {
        logits.chunks(BLOCK).fold(self, |seen, block| seen.merge(block_partial(block)))
    }

    /// Two parts of a row as one, `later` being the one of the higher entries.
    ///
    /// The bits depend on the sequence of the parts, so merge the shards of a row one by one, in order of their entries,
    /// wherever they are. A part without entries changes nothing.
    #[must_use]
    pub fn merge(self, later: Self) -> Self {
        if self.sum == 0.0 {
            return later;
        }
        if later.sum == 0.0 {
            return self;
        }
        let max = self.max.max(later.max);
        let (a, b) = (self.rebased(max), later.rebased(max));
        let label_logit = if self.label_logit.is_nan() { later.label_logit } else { self.label_logit };
        Self { max, sum: a.sum + b.sum, moment: a.moment + b.moment, label_logit }
    }

    /// The same sums relative to `max` instead of the part's own maximum.
    fn rebased(self, max: f32) -> Self {
        if self.max == max {
            return self;
        }
        let shift = f64::from(self.max) - f64::from(max);
        let scale = shift.exp();
        Self { max, sum: scale * self.sum, moment: scale * (self.moment + shift * self.sum), ..self }
    }

    /// The statistics of a row that has been seen whole.
    pub fn finish(self) -> RowStats {
        let log_sum = self.sum.ln();
        RowStats {
            lse: (f64::from(self.max) + log_sum) as f32,
            entropy: (log_sum - self.moment / self.sum) as f32,
            max: self.max,
            log_sum,
        }
    }

    /// The four fields as they stand, for an exchange between ranks; [`HeadPartial::from_array`] reverses it exactly.
    pub fn to_array(self) -> [f64; 4] {
        [f64::from(self.max), self.sum, self.moment, f64::from(self.label_logit)]
    }

    /// The partial that [`HeadPartial::to_array`] took apart.
    pub fn from_array([max, sum, moment, label_logit]: [f64; 4]) -> Self {
        Self { max: max as f32, sum, moment, label_logit: label_logit as f32 }
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
    row_partial(logits).finish()
}

/// One shard's part of a row's statistics, from the shard's logits: bit for bit that of [`super::head_partials`].
///
/// The shard starts at a multiple of [`BLOCK`]. [`HeadPartial::merge`] over all shards in order, then
/// [`HeadPartial::finish`], gives the row's statistics. `label_logit` stays empty: [`RowStats::log_prob`] takes the logit.
pub fn row_partial(logits: &[f32]) -> HeadPartial {
    HeadPartial::EMPTY.extend(logits)
}

simd_fn! { fn block_partial(logits: &[f32]) -> HeadPartial = block_partial_body; }

#[inline(always)]
fn block_partial_body<const FMA: bool>(logits: &[f32]) -> HeadPartial {
    let max = max(logits);
    let (mut sums, mut moments) = ([0f32; LANES], [0f32; LANES]);
    let (groups, rest) = logits.as_chunks::<LANES>();
    for group in groups {
        for lane in 0..LANES {
            let shifted = group[lane] - max;
            let e = exp_small::<FMA>(shifted);
            sums[lane] += e;
            moments[lane] = fma::<FMA>(e, shifted, moments[lane]);
        }
    }
    for (lane, &logit) in rest.iter().enumerate() {
        let shifted = logit - max;
        let e = exp_small::<FMA>(shifted);
        sums[lane] += e;
        moments[lane] = fma::<FMA>(e, shifted, moments[lane]);
    }
    let (sum, moment) = (f64::from(sum_lanes(sums)), f64::from(sum_lanes(moments)));
    HeadPartial { max, sum, moment, label_logit: f32::NAN }
}
