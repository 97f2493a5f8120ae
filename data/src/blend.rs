//! Mixing several sources by weight.
//!
//! The mixture is one fixed list of `(source, row)` that stands for an epoch: each source gives rows in proportion to its
//! weight, evenly spread (no long stretch of one source), each source's own rows in its own shuffled order and none twice
//! before all of them were taken once. [`crate::order::Sampler`] then visits the list; blend and order stay apart.

use crate::error::{DataError, Result};
use crate::order::permutation;

/// A row of a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Pick {
    /// The source's number.
    pub source: usize,
    /// The row's number in it.
    pub row: usize,
}

/// Mixes sources of the given sizes.
///
/// Without weights (all `None`) every row appears exactly once. With weights, source `s` gives `⌊total · w_s / Σw⌋` rows (the
/// remainder goes to the largest fractions), where `total` is the sum of the sizes; a source with fewer rows than its share
/// repeats, one with more gives a part.
///
/// # Errors
/// No source, an empty source with a weight above zero, some weights given and others not, and weights that are negative, not
/// finite or all zero.
pub fn blend(sizes: &[usize], weights: &[Option<f64>], seed: u64) -> Result<Vec<Pick>> {
    let counts = counts(sizes, weights)?;
    let mut orders: Vec<SourceOrder> =
        sizes.iter().enumerate().map(|(s, &len)| SourceOrder::new(seed, s, len)).collect();
    // The k-th row of a source that gives n stands at (k + 1/2) / n of the mixture: compare as exact fractions.
    let mut slots: Vec<(u128, u128, usize)> = Vec::with_capacity(counts.iter().sum());
    for (source, &count) in counts.iter().enumerate() {
        slots.extend((0..count).map(|k| (2 * k as u128 + 1, 2 * count as u128, source)));
    }
    slots.sort_by(|a, b| (a.0 * b.1).cmp(&(b.0 * a.1)).then(a.2.cmp(&b.2)));
    Ok(slots.into_iter().map(|(_, _, source)| Pick { source, row: orders[source].next() }).collect())
}

fn counts(sizes: &[usize], weights: &[Option<f64>]) -> Result<Vec<usize>> {
    let wrong = |reason: String| DataError::Setting { what: "data weights".into(), reason };
    if sizes.is_empty() || sizes.len() != weights.len() {
        return Err(wrong(format!("{} sources and {} weights", sizes.len(), weights.len())));
    }
    if weights.iter().all(Option::is_none) {
        return Ok(sizes.to_vec());
    }
    let Some(weights) = weights.iter().copied().collect::<Option<Vec<f64>>>() else {
        return Err(wrong("either every source has a weight or none".into()));
    };
    if let Some(bad) = weights.iter().find(|weight| !(weight.is_finite() && **weight >= 0.0)) {
        return Err(wrong(format!("{bad} is not a number of at least 0")));
    }
    let sum: f64 = weights.iter().sum();
    if !(sum > 0.0 && sum.is_finite()) {
        return Err(wrong("at least one must be above 0".into()));
    }
    if let Some(empty) = (0..sizes.len()).find(|&source| sizes[source] == 0 && weights[source] > 0.0) {
        return Err(wrong(format!("source {empty} has a weight of {} but no rows", weights[empty])));
    }
    let total: usize = sizes.iter().sum();
    let exact: Vec<f64> = weights.iter().map(|weight| total as f64 * weight / sum).collect();
    let mut counts: Vec<usize> = exact.iter().map(|share| share.floor() as usize).collect();
    let mut by_fraction: Vec<usize> = (0..sizes.len()).filter(|&source| weights[source] > 0.0).collect();
    by_fraction.sort_by(|&a, &b| exact[b].fract().total_cmp(&exact[a].fract()).then(a.cmp(&b)));
    let missing = total.saturating_sub(counts.iter().sum());
    for &source in by_fraction.iter().cycle().take(missing) {
        counts[source] += 1;
    }
    Ok(counts)
}

/// A source's rows, shuffled anew each time all of them were given.
struct SourceOrder {
    seed: u64,
    round: u64,
    order: Vec<usize>,
    given: usize,
}

impl SourceOrder {
    fn new(seed: u64, source: usize, len: usize) -> Self {
        // Sources of equal length must not share one order.
        let seed = seed ^ (source as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Self { seed, round: 0, order: permutation(seed, 0, len), given: 0 }
    }

    fn next(&mut self) -> usize {
        if self.given == self.order.len() {
            self.round += 1;
            self.order = permutation(self.seed, self.round, self.order.len());
            self.given = 0;
        }
        self.given += 1;
        self.order[self.given - 1]
    }
}
