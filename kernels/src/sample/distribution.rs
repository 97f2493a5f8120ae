//! From finite logits to a draw: penalise, restrict the support, invert the cumulative distribution.

use std::borrow::Cow;

use super::SamplingParams;
use crate::math;
use crate::simd::simd_fn;

/// Entries summed together when the whole vocabulary is the support.
const BLOCK: usize = 512;
/// Most probable entries that the search for the top-p set sorts at first; four times as many each further round.
const FIRST_SORTED: usize = 64;

/// Logits with the repetition penalty, applied once to each token of the history.
pub(super) fn penalised<'a>(logits: &'a [f32], history: &[u32], penalty: f32) -> Cow<'a, [f32]> {
    if penalty == 1.0 || history.is_empty() {
        return Cow::Borrowed(logits);
    }
    let mut scores = logits.to_vec();
    for &token in history {
        let logit = logits[token as usize];
        let score = if logit > 0.0 { logit / penalty } else { logit * penalty };
        // A product beyond the largest float would otherwise become an infinity.
        scores[token as usize] = score.clamp(f32::MIN, f32::MAX);
    }
    Cow::Owned(scores)
}

/// Index of the largest score, the first of equals.
pub(super) fn argmax(scores: &[f32]) -> usize {
    let max = math::max(scores);
    scores.iter().position(|&score| score == max).unwrap_or(0)
}

/// Draws an index; returns it with its log-probability under temperature and truncation.
pub(super) fn draw(scores: &[f32], params: &SamplingParams, uniform: f64) -> (usize, f32) {
    let softmax = Softmax::new(scores, params.temperature);
    let (index, total) = if params.truncates() {
        let support = softmax.support(params);
        let weights: Vec<f64> = support.iter().map(|&index| softmax.weight(index)).collect();
        (support[pick(&weights, uniform).index] as usize, weights.iter().sum())
    } else {
        let block_sums: Vec<f64> = softmax.weights.chunks(BLOCK).map(|block| f64::from(math::sum(block))).collect();
        let block = pick(&block_sums, uniform);
        let start = block.index * BLOCK;
        let end = scores.len().min(start + BLOCK);
        let weights: Vec<f64> = softmax.weights[start..end].iter().map(|&weight| f64::from(weight)).collect();
        (start + pick(&weights, block.rest).index, block_sums.iter().sum::<f64>())
    };
    let exponent = (scores[index] - softmax.max) / params.temperature;
    (index, (f64::from(exponent) - total.ln()) as f32)
}

/// Scores as unnormalised probabilities.
struct Softmax<'a> {
    scores: &'a [f32],
    max: f32,
    /// `exp((score − max) / temperature)`: the largest is 1.
    weights: Vec<f32>,
}

impl<'a> Softmax<'a> {
    fn new(scores: &'a [f32], temperature: f32) -> Self {
        let max = math::max(scores);
        let mut weights = scores.to_vec();
        exponentiate(&mut weights, max, temperature);
        Self { scores, max, weights }
    }

    fn weight(&self, index: u32) -> f64 {
        f64::from(self.weights[index as usize])
    }

    /// An integer that orders entries by rank, larger scores first and of equals the lower index; holds the index in its
    /// low half. Integers select and sort several times as fast as indices that look their scores up.
    fn rank_key(&self, index: usize) -> u64 {
        // Adding 0 turns -0 into 0, which it equals.
        let bits = (self.scores[index] + 0.0).to_bits();
        // As integers, positive floats order like their bits and negative ones the other way round.
        let ascending = if bits >> 31 == 0 { bits | 1 << 31 } else { !bits };
        u64::from(!ascending) << 32 | index as u64
    }

    /// The entries that top-k, top-p and min-p leave, in order of index; never empty.
    fn support(&self, params: &SamplingParams) -> Vec<u32> {
        let mut kept: Vec<u64> = (0..self.scores.len()).map(|index| self.rank_key(index)).collect();
        if (1..kept.len()).contains(&params.top_k) {
            kept.select_nth_unstable(params.top_k);
            kept.truncate(params.top_k);
        }
        if params.top_p < 1.0 {
            self.keep_top_p(&mut kept, f64::from(params.top_p));
        }
        let mut support: Vec<u32> = kept.into_iter().map(|key| key as u32).collect();
        if params.min_p > 0.0 {
            // The most probable entry has weight 1.
            support.retain(|&index| self.weight(index) >= f64::from(params.min_p));
        }
        support.sort_unstable();
        support
    }

    /// Keeps the fewest highest-ranked entries whose weights reach `top_p` of the sum of all of `kept`.
    fn keep_top_p(&self, kept: &mut Vec<u64>, top_p: f64) {
        // Partitioning by rank leaves an order that is no promise; the sum needs one.
        if kept.len() < self.scores.len() {
            kept.sort_unstable();
        }
        let wanted = top_p * kept.iter().map(|&key| self.weight(key as u32)).sum::<f64>();
        let (mut mass, mut sorted, mut goal) = (0.0, 0, FIRST_SORTED);
        while sorted < kept.len() {
            let end = goal.min(kept.len());
            let rest = &mut kept[sorted..];
            if end - sorted < rest.len() {
                rest.select_nth_unstable(end - sorted);
            }
            kept[sorted..end].sort_unstable();
            for position in sorted..end {
                mass += self.weight(kept[position] as u32);
                if mass >= wanted {
                    kept.truncate(position + 1);
                    return;
                }
            }
            (sorted, goal) = (end, goal * 4);
        }
    }
}

/// Where a uniform number falls among weights.
struct Pick {
    /// The weight it falls on.
    index: usize,
    /// How far into that weight, in `[0, 1)`: again uniform.
    rest: f64,
}

/// Inverts the cumulative distribution of `weights`, of which one at least is positive.
fn pick(weights: &[f64], uniform: f64) -> Pick {
    let target = uniform * weights.iter().sum::<f64>();
    let mut before = 0.0;
    let mut last = 0;
    for (index, &weight) in weights.iter().enumerate() {
        if weight > 0.0 {
            if target < before + weight {
                return Pick { index, rest: ((target - before) / weight).clamp(0.0, BELOW_ONE) };
            }
            last = index;
        }
        before += weight;
    }
    // Rounding can put the target on the very end.
    Pick { index: last, rest: BELOW_ONE }
}

/// The largest f64 below 1.
const BELOW_ONE: f64 = 1.0 - f64::EPSILON / 2.0;

simd_fn! { fn exponentiate(scores: &mut [f32], max: f32, temperature: f32) = exponentiate_body; }

#[inline(always)]
fn exponentiate_body<const FMA: bool>(scores: &mut [f32], max: f32, temperature: f32) {
    for score in scores {
        *score = math::exp::<FMA>((*score - max) / temperature);
    }
}
