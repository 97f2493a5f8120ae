//! From finite logits to a draw: penalise, restrict the support, invert the cumulative distribution.

use std::borrow::Cow;

use super::SamplingParams;
use crate::logprob::BLOCK;
use crate::math;
use crate::simd::simd_fn;

/// Most probable entries that the search for the top-p set sorts at first; four times as many each further round.
const FIRST_SORTED: usize = 64;

/// Logits of the entries from `first_entry` on, with the repetition penalty applied once to each token of the history.
pub(super) fn penalised<'a>(logits: &'a [f32], first_entry: usize, history: &[u32], penalty: f32) -> Cow<'a, [f32]> {
    if penalty == 1.0 || history.is_empty() {
        return Cow::Borrowed(logits);
    }
    let mut scores = logits.to_vec();
    for &token in history {
        let Some(index) = (token as usize).checked_sub(first_entry).filter(|&index| index < logits.len()) else {
            continue;
        };
        let logit = logits[index];
        let score = if logit > 0.0 { logit / penalty } else { logit * penalty };
        // A product beyond the largest float would otherwise become an infinity.
        scores[index] = score.clamp(f32::MIN, f32::MAX);
    }
    Cow::Owned(scores)
}

/// Index of the first score that equals `max`, the largest.
pub(super) fn position(scores: &[f32], max: f32) -> Option<usize> {
    // Block by block: the maximum of a block is vector code, the search inside it is not.
    let block = scores.chunks(BLOCK).position(|block| math::max(block) == max)?;
    let start = block * BLOCK;
    scores[start..].iter().position(|&score| score == max).map(|offset| start + offset)
}

/// Unnormalised probabilities `exp((score − max) / temperature)`: the largest is 1.
pub(super) fn weights(scores: &[f32], max: f32, temperature: f32) -> Vec<f32> {
    let mut weights = scores.to_vec();
    exponentiate(&mut weights, max, temperature);
    weights
}

/// The sum of the weights of each block of entries.
pub(super) fn block_sums(scores: &[f32], max: f32, temperature: f32) -> Vec<f64> {
    let mut weights = [0f32; BLOCK];
    let sum = |scores: &[f32]| {
        let weights = &mut weights[..scores.len()];
        weights.copy_from_slice(scores);
        exponentiate(weights, max, temperature);
        f64::from(math::sum(weights))
    };
    scores.chunks(BLOCK).map(sum).collect()
}

/// An integer that orders entries by rank, larger scores first and of equals the lower index; holds the index in its
/// low half. Integers select and sort several times as fast as indices that look their scores up.
fn rank_key(score: f32, index: usize) -> u64 {
    // Adding 0 turns -0 into 0, which it equals.
    let bits = (score + 0.0).to_bits();
    // As integers, positive floats order like their bits and negative ones the other way round.
    let ascending = if bits >> 31 == 0 { bits | 1 << 31 } else { !bits };
    u64::from(!ascending) << 32 | index as u64
}

/// Rank keys of the `count` highest-ranked entries, of all if `count` is 0, in no promised order.
fn highest(scores: &[f32], count: usize) -> Vec<u64> {
    let mut kept: Vec<u64> = scores.iter().enumerate().map(|(index, &score)| rank_key(score, index)).collect();
    if (1..kept.len()).contains(&count) {
        kept.select_nth_unstable(count);
        kept.truncate(count);
    }
    kept
}

/// Indices of the entries that remain in the running whatever the other shards hold, in order: the `top_k` highest, or,
/// without top-k, those that min-p keeps. `max` is the largest score of the whole row.
pub(super) fn candidates(scores: &[f32], max: f32, params: &SamplingParams) -> Vec<usize> {
    if params.top_k == 0 {
        let weights = weights(scores, max, params.temperature);
        return (0..scores.len()).filter(|&index| weights[index] >= params.min_p).collect();
    }
    let mut kept: Vec<usize> = highest(scores, params.top_k).into_iter().map(|key| key as u32 as usize).collect();
    kept.sort_unstable();
    kept
}

/// Draws one of `scores` under top-k, top-p and min-p; returns its index and the sum of the weights of all that could
/// have been drawn.
///
/// `scores` are the row's `vocabulary` scores or its [`candidates`], in order of their entries, `max` the row's largest.
pub(super) fn draw(scores: &[f32], vocabulary: usize, max: f32, params: &SamplingParams, uniform: f64) -> (usize, f64) {
    let all = weights(scores, max, params.temperature);
    let support = support(scores, &all, vocabulary, params);
    let weights: Vec<f64> = support.iter().map(|&index| f64::from(all[index as usize])).collect();
    (support[pick(&weights, uniform).index] as usize, weights.iter().sum())
}

/// The entries that top-k, top-p and min-p leave, in order of index; never empty.
fn support(scores: &[f32], weights: &[f32], vocabulary: usize, params: &SamplingParams) -> Vec<u32> {
    let mut kept = highest(scores, params.top_k);
    if params.top_p < 1.0 {
        // Partitioning by rank leaves an order that is no promise; the sum needs one.
        if kept.len() < vocabulary {
            kept.sort_unstable();
        }
        keep_top_p(&mut kept, weights, f64::from(params.top_p));
    }
    let mut support: Vec<u32> = kept.into_iter().map(|key| key as u32).collect();
    if params.min_p > 0.0 {
        // The most probable entry has weight 1.
        support.retain(|&index| weights[index as usize] >= params.min_p);
    }
    support.sort_unstable();
    support
}

/// Keeps the fewest highest-ranked entries whose weights reach `top_p` of the sum of all of `kept`.
fn keep_top_p(kept: &mut Vec<u64>, weights: &[f32], top_p: f64) {
    let weight = |key: u64| f64::from(weights[key as u32 as usize]);
    let wanted = top_p * kept.iter().map(|&key| weight(key)).sum::<f64>();
    let (mut mass, mut sorted, mut goal) = (0.0, 0, FIRST_SORTED);
    while sorted < kept.len() {
        let end = goal.min(kept.len());
        let rest = &mut kept[sorted..];
        if end - sorted < rest.len() {
            rest.select_nth_unstable(end - sorted);
        }
        kept[sorted..end].sort_unstable();
        for position in sorted..end {
            mass += weight(kept[position]);
            if mass >= wanted {
                kept.truncate(position + 1);
                return;
            }
        }
        (sorted, goal) = (end, goal * 4);
    }
}

/// Where a uniform number falls among weights.
pub(super) struct Pick {
    /// The weight it falls on.
    pub(super) index: usize,
    /// How far into that weight, in `[0, 1)`: again uniform.
    pub(super) rest: f64,
}

/// Inverts the cumulative distribution of `weights`, of which one at least is positive.
pub(super) fn pick(weights: &[f64], uniform: f64) -> Pick {
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
    if temperature == 1.0 {
        // The same bits without the division, which takes longer than the rest.
        return scores.iter_mut().for_each(|score| *score = math::exp::<FMA>(*score - max));
    }
    for score in scores {
        *score = math::exp::<FMA>((*score - max) / temperature);
    }
}
