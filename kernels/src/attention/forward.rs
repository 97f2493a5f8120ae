//! The forward: tiles of 32 query rows against blocks of keys, with a running softmax.
//!
//! Queries lie in the lanes: scores are `[key, query]`, the output `[D, query]` until the end.

use std::ops::Range;

use super::blocks::{Block, HeadRows, pack, padded};
use super::multiply::{Left, ROWS, multiply};
use super::queries::{Gathered, Lanes, QueryTile, TILE_QUERIES, VECTORS, lanes};
use super::tasks::{self, Ahead, Task};
use super::tile::Right;
#[cfg(target_arch = "x86_64")]
use super::vector;
use super::{AttentionSpec, BLOCK_KEYS};
use crate::element::Element;
use crate::gemm::{Output, transpose};
use crate::math::{LANES, exp, larger, ln};
use crate::room::Room;
use crate::simd::{Isa, fma, simd_fn};

/// The part of keys `from..to` in the block that starts at key `start`, counted from the block's start.
pub(super) fn block_range(from: usize, to: usize, start: usize) -> (usize, usize) {
    (from.saturating_sub(start).min(BLOCK_KEYS), to.saturating_sub(start).min(BLOCK_KEYS))
}

/// Running softmax of a tile.
#[derive(Clone, Copy)]
struct Running {
    /// Largest score so far, per query.
    maximum: Lanes,
    /// Sum of `exp(score - maximum)`, per query.
    sum: Lanes,
}

/// What a task works in.
struct Scratch {
    keys: Room,
    values: Room,
    queries: Gathered,
    /// Scores, then probabilities, `[64, 32]`.
    scores: Room,
    /// Unnormalised output, `[D padded, 32]`.
    output: Room,
    /// Output by rows, `[32, D padded]`.
    rows: Room,
}

/// Attention of all blocks; writes `o [T, H D]` and `lse [T, H]`.
pub(super) fn forward<E: Element>(
    qkv: &[E],
    blocks: &[Block],
    spec: &AttentionSpec,
    o: Output<'_, E>,
    lse: Output<'_, f32>,
) {
    let row_bytes = 2 * (spec.group() + 1) * spec.head_dim * size_of::<E>();
    let tasks = tasks::cut(blocks, spec, row_bytes, true);
    let (o, lse) = (HeadRows::new(o, spec.output_width(), spec.head_dim), HeadRows::new(lse, spec.heads, 1));
    let stride = padded(spec.head_dim);
    let scratch = || Scratch {
        keys: Room::default(),
        values: Room::default(),
        queries: Gathered::new(spec.head_dim),
        scores: Room::zeros(BLOCK_KEYS * TILE_QUERIES),
        output: Room::zeros(stride * TILE_QUERIES),
        rows: Room::zeros(TILE_QUERIES * stride),
    };
    let lines = |task: &Task| {
        let mut lines = vec![task.query_lines(qkv.as_ptr(), spec.qkv_width(), spec.head_dim, spec)];
        lines.extend(task.key_lines(qkv.as_ptr(), spec));
        lines.push(task.query_lines(o.start(), spec.output_width(), spec.head_dim, spec).writing());
        lines.push(task.query_lines(lse.start(), spec.heads, 1, spec).writing());
        lines
    };
    let tiles_of_block = BLOCK_KEYS / TILE_QUERIES;
    let steps = |task: &Task| task.pairs(spec) * tiles_of_block * (BLOCK_KEYS + stride) / ROWS;
    tasks::run(&tasks, scratch, lines, steps, |task, scratch, ahead| {
        for kv_head in task.kv_heads.clone() {
            attend_group(task, kv_head, qkv, spec, scratch, &o, &lse, ahead);
        }
    });
}

/// Attention of a task's query heads that read `kv_head`.
fn attend_group<E: Element>(
    task: &Task,
    kv_head: usize,
    qkv: &[E],
    spec: &AttentionSpec,
    scratch: &mut Scratch,
    o: &HeadRows<E>,
    lse: &HeadRows<f32>,
    ahead: &mut Ahead,
) {
    let (width, head_dim) = (spec.qkv_width(), spec.head_dim);
    let tiles = || task.sequence[task.queries.clone()].iter().flat_map(|block| QueryTile::of(block, spec));
    let seen = &task.sequence[task.keys.clone()];
    let Scratch { keys, values, queries: gathered, scores, output, rows } = scratch;
    let key_column = (spec.heads + kv_head) * head_dim;
    let keys = pack(qkv, width, key_column, head_dim, seen, keys);
    let value_column = key_column + spec.kv_heads * head_dim;
    let values = pack(qkv, width, value_column, head_dim, seen, values);
    for head in kv_head * spec.group()..(kv_head + 1) * spec.group() {
        for tile in tiles() {
            gathered.gather(&tile, qkv, width, head * head_dim, head_dim);
            let sums =
                attend(&tile, &gathered.lanes, (keys, values), task.keys.start, spec, scores, output, rows, ahead);
            // SAFETY: heads of a group and rows of a block belong to one task.
            unsafe {
                o.write(tile.token, tile.rows, head * head_dim, rows, padded(head_dim));
                lse.write(tile.token, tile.rows, head, sums.as_flattened(), 1);
            }
        }
    }
}

/// Attends the queries of a tile, `q [D, 32]`, to all blocks of `keys` and `values` that it sees; the first of them,
/// `[64, D padded]` each, is block `first` of the sequence. Leaves the output in `rows`; returns the logarithms of the sums
/// of exponentials.
fn attend(
    tile: &QueryTile,
    q: &[f32],
    (keys, values): (&[f32], &[f32]),
    first: usize,
    spec: &AttentionSpec,
    scores: &mut [f32],
    output: &mut [f32],
    rows: &mut [f32],
    ahead: &mut Ahead,
) -> Lanes {
    let (head_dim, stride) = (spec.head_dim, padded(spec.head_dim));
    let mut running = Running { maximum: [[f32::NEG_INFINITY; LANES]; VECTORS], sum: [[0.0; LANES]; VECTORS] };
    output.fill(0.0);
    for n in tile.blocks() {
        let seen = tile.keys(n * BLOCK_KEYS);
        let whole = seen.start / ROWS * ROWS..seen.end.next_multiple_of(ROWS);
        let block = (n - first) * BLOCK_KEYS * stride..(n - first + 1) * BLOCK_KEYS * stride;
        let k = Left { values: &keys[block.clone()], row: stride, step: 1 };
        let q = Right { values: q, stride: TILE_QUERIES };
        multiply(k, whole, q, 0..head_dim, scores, TILE_QUERIES, TILE_QUERIES, false, ahead);
        probabilities(scores, seen.clone(), n * BLOCK_KEYS, tile, spec.scale, &mut running, output);
        let v = Left { values: &values[block], row: 1, step: stride };
        let p = Right { values: scores, stride: TILE_QUERIES };
        multiply(v, 0..stride, p, seen, output, TILE_QUERIES, TILE_QUERIES, true, ahead);
    }
    let sums = normalise(output, &running);
    transpose(output, TILE_QUERIES, stride, TILE_QUERIES, stride, rows);
    sums
}

/// Turns the scores `[64, 32]` of the keys `seen` of the block that starts at key `start` into
/// `exp(scale · score - maximum)`, those of hidden keys into 0, updates maximum and sum, and brings `output` to the new
/// maximum.
fn probabilities(
    scores: &mut [f32],
    seen: Range<usize>,
    start: usize,
    tile: &QueryTile,
    scale: f32,
    running: &mut Running,
    output: &mut [f32],
) {
    let (scores, output, old) = (lanes(scores), lanes(output), *running);
    scale_scores(scores, seen.clone(), start, tile, scale, &mut running.maximum);
    // Of a query that has seen no key yet: e^(-inf - 0), not of the difference of two infinities.
    let shift = running.maximum.map(|vector| vector.map(|m| if m == f32::NEG_INFINITY { 0.0 } else { m }));
    let sums = exponentials(scores, seen, &shift);
    let mut rescale = old.maximum;
    join(sums, &shift, &mut rescale, &mut running.sum);
    multiply_rows(output, &rescale);
}

simd_fn! {
    /// From the sixteen `sums` of a block: `rescale`, the old maximum, becomes the factor that brings what was accumulated
    /// before to the new maximum, `shift`; `sum` is brought there, and the block's sum added.
    fn join(sums: [Lanes; LANES], shift: &Lanes, rescale: &mut Lanes, sum: &mut Lanes) = join_body;
}

#[inline(always)]
fn join_body<const FMA: bool>(mut sums: [Lanes; LANES], shift: &Lanes, rescale: &mut Lanes, sum: &mut Lanes) {
    // As a tree: the order of `math::sum`.
    for width in [8, 4, 2, 1] {
        let (low, high) =
            sums.as_flattened_mut().as_flattened_mut()[..2 * width * TILE_QUERIES].split_at_mut(width * TILE_QUERIES);
        low.iter_mut().zip(high).for_each(|(low, high)| *low += *high);
    }
    let (rescale, sum, block) = (rescale.as_flattened_mut(), sum.as_flattened_mut(), sums[0].as_flattened());
    for (rescale, shift) in rescale.iter_mut().zip(shift.as_flattened()) {
        *rescale = exp::<FMA>(*rescale - shift);
    }
    for ((sum, rescale), block) in sum.iter_mut().zip(rescale).zip(block) {
        *sum = fma::<FMA>(*sum, *rescale, *block);
    }
}

/// [`vector::scale_scores`] for any instruction set.
fn scale_scores(
    scores: &mut [Lanes],
    seen: Range<usize>,
    start: usize,
    tile: &QueryTile,
    scale: f32,
    maximum: &mut Lanes,
) {
    #[cfg(target_arch = "x86_64")]
    if Isa::active() >= Isa::Avx512 {
        // SAFETY: AVX-512 is active.
        return unsafe { vector::scale_scores(scores, seen, start, tile, scale, maximum) };
    }
    for key in seen {
        let (row, queries) = (scores[key].as_flattened_mut(), tile.seeing(start + key));
        for (query, (score, maximum)) in row.iter_mut().zip(maximum.as_flattened_mut()).enumerate() {
            *score = if queries.contains(&query) { *score * scale } else { f32::NEG_INFINITY };
            *maximum = larger(*maximum, *score);
        }
    }
}

/// [`vector::exponentials`] for any instruction set.
fn exponentials(scores: &mut [Lanes], seen: Range<usize>, shift: &Lanes) -> [Lanes; LANES] {
    #[cfg(target_arch = "x86_64")]
    if Isa::active() >= Isa::Avx512 {
        // SAFETY: AVX-512 is active.
        return unsafe { vector::exponentials(scores, seen, shift) };
    }
    let mut sums = [[[0.0; LANES]; VECTORS]; LANES];
    for key in seen {
        add_exponentials(scores[key].as_flattened_mut(), shift.as_flattened(), sums[key % LANES].as_flattened_mut());
    }
    sums
}

simd_fn! {
    fn add_exponentials(scores: &mut [f32], shift: &[f32], sums: &mut [f32]) = add_exponentials_body;
}

#[inline(always)]
fn add_exponentials_body<const FMA: bool>(scores: &mut [f32], shift: &[f32], sums: &mut [f32]) {
    for ((score, shift), sum) in scores.iter_mut().zip(shift).zip(sums) {
        *score = exp::<FMA>(*score - shift);
        *sum += *score;
    }
}

/// Multiplies every row by `factor`.
fn multiply_rows(rows: &mut [Lanes], factor: &Lanes) {
    #[cfg(target_arch = "x86_64")]
    if Isa::active() >= Isa::Avx512 {
        // SAFETY: AVX-512 is active.
        return unsafe { vector::multiply_rows(rows, factor) };
    }
    for row in rows {
        row.as_flattened_mut().iter_mut().zip(factor.as_flattened()).for_each(|(value, factor)| *value *= factor);
    }
}

/// Divides the output by the sums; returns the logarithms of the sums of exponentials.
fn normalise(output: &mut [f32], running: &Running) -> Lanes {
    let output = lanes(output);
    let mut log_sums = running.sum;
    add_logarithms(&running.maximum, &mut log_sums);
    #[cfg(target_arch = "x86_64")]
    if Isa::active() >= Isa::Avx512 {
        // SAFETY: AVX-512 is active.
        unsafe { vector::divide_rows(output, &running.sum) };
        return log_sums;
    }
    for row in output {
        row.as_flattened_mut().iter_mut().zip(running.sum.as_flattened()).for_each(|(value, sum)| *value /= sum);
    }
    log_sums
}

simd_fn! {
    /// `maximum + ln sum` in place of `sum`.
    fn add_logarithms(maximum: &Lanes, sum: &mut Lanes) = add_logarithms_body;
}

#[inline(always)]
fn add_logarithms_body<const FMA: bool>(maximum: &Lanes, sum: &mut Lanes) {
    for (sum, maximum) in sum.as_flattened_mut().iter_mut().zip(maximum.as_flattened()) {
        *sum = maximum + ln::<FMA>(*sum);
    }
}
