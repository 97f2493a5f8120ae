//! Reductions over slices: fixed chunks in parallel, fixed lanes inside a chunk.

use rayon::prelude::*;

use super::BLOCK;
use crate::simd::simd_fn;

/// Elements that one task reduces. Part of the order of arithmetic: changing it changes results.
const CHUNK: usize = 4096;
/// Elements that one task changes where each is on its own.
const TASK: usize = 16 * 1024;
/// Independent accumulators inside a chunk.
const LANES: usize = 16;

pub(super) fn sum(x: &[f32]) -> f64 {
    pairwise(&x.par_chunks(CHUNK).map(chunk_sum).collect::<Vec<_>>())
}

pub(super) fn sum_squares(x: &[f32]) -> f64 {
    pairwise(&x.par_chunks(CHUNK).map(chunk_sum_squares).collect::<Vec<_>>())
}

pub(super) fn block_sum_squares(x: &[f32], out: &mut Vec<f64>) {
    const TASK_BLOCKS: usize = 16;
    let start = out.len();
    out.resize(start + x.len().div_ceil(BLOCK), 0.0);
    let tasks = out[start..].par_chunks_mut(TASK_BLOCKS).zip(x.par_chunks(TASK_BLOCKS * BLOCK));
    tasks.for_each(|(sums, x)| {
        for (sum, block) in sums.iter_mut().zip(x.chunks(BLOCK)) {
            *sum = chunk_sum_squares(block);
        }
    });
}

pub(super) fn add(target: &mut [f32], term: &[f32]) {
    target.par_chunks_mut(TASK).zip(term.par_chunks(TASK)).for_each(|(target, term)| {
        for (target, term) in target.iter_mut().zip(term) {
            *target += term;
        }
    });
}

pub(super) fn scale(target: &mut [f32], factor: f32) {
    target.par_chunks_mut(TASK).for_each(|target| target.iter_mut().for_each(|value| *value *= factor));
}

pub(super) fn max_abs(x: &[f32]) -> f32 {
    // Without their sign bit, floats order as integers, with NaN above infinity; an integer maximum needs no fixed order.
    f32::from_bits(x.par_chunks(CHUNK).map(chunk_max_magnitude).max().unwrap_or(0))
}

pub(super) fn first_non_finite(x: &[f32]) -> Option<usize> {
    let chunk = x.par_chunks(CHUNK).position_first(|chunk| chunk_max_magnitude(chunk) >= f32::INFINITY.to_bits())?;
    let start = chunk * CHUNK;
    x[start..].iter().position(|value| !value.is_finite()).map(|offset| start + offset)
}

simd_fn! { fn chunk_sum(x: &[f32]) -> f64 = chunk_sum_body; }
simd_fn! { fn chunk_sum_squares(x: &[f32]) -> f64 = chunk_sum_squares_body; }
simd_fn! { fn chunk_max_magnitude(x: &[f32]) -> u32 = chunk_max_magnitude_body; }

#[inline(always)]
fn chunk_sum_body<const FMA: bool>(x: &[f32]) -> f64 {
    lanes(x, |value| value)
}

#[inline(always)]
fn chunk_sum_squares_body<const FMA: bool>(x: &[f32]) -> f64 {
    lanes(x, |value| value * value)
}

#[inline(always)]
fn chunk_max_magnitude_body<const FMA: bool>(x: &[f32]) -> u32 {
    x.iter().fold(0, |max, value| max.max(value.to_bits() & !(1 << 31)))
}

/// Σ f(x): element `i` goes to lane `i mod LANES`; the lanes are then added pairwise.
#[inline(always)]
fn lanes(x: &[f32], f: impl Fn(f64) -> f64) -> f64 {
    let mut lanes = [0f64; LANES];
    let (groups, rest) = x.as_chunks::<LANES>();
    for group in groups {
        for lane in 0..LANES {
            lanes[lane] += f(f64::from(group[lane]));
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(rest) {
        *lane += f(f64::from(value));
    }
    pairwise(&lanes)
}

/// Adds values in a binary tree that depends on their number only.
pub(super) fn pairwise(values: &[f64]) -> f64 {
    match values {
        [] => 0.0,
        [value] => *value,
        _ => {
            let (left, right) = values.split_at(values.len().next_power_of_two() / 2);
            pairwise(left) + pairwise(right)
        }
    }
}
