//! The backward: probabilities are recomputed block by block from the saved sums.
//!
//! A task is one query head of one sequence. It takes key blocks in order and, for each, the query blocks that see it in
//! order, so every gradient has one owner and one order of summation. Heads are joined afterwards.

use std::array;
use std::ops::Range;

use rayon::prelude::*;

use super::blocks::{Block, Pack, copy_head, pack, padded, rows_len, transposed_len};
use super::forward::{block_range, union, whole_vectors};
use super::tile::{Right, TILE_ROWS, product, product_transposed};
use super::{AttentionSpec, BLOCK_KEYS};
use crate::element::Element;
use crate::math::{LANES, dot, exp};
use crate::simd::{fma, simd_fn};

/// A matrix of one value per (query row, key) of a pair of blocks.
type Pair = [[f32; BLOCK_KEYS]; BLOCK_KEYS];

/// Packed keys and values of the whole batch, `[blocks, K, block of a head]`.
struct Packed {
    /// Keys by rows, for `dQ`.
    k: Vec<f32>,
    /// Keys transposed, for the scores.
    k_transposed: Vec<f32>,
    /// Values transposed, for `dO Vᵀ`.
    v_transposed: Vec<f32>,
}

/// What the backward is given.
#[derive(Clone, Copy)]
pub(super) struct Inputs<'a, E> {
    /// Gradient of the output, `[T, H D]`.
    pub(super) d_o: &'a [E],
    /// Fused projection, `[T, (H + 2K) D]`.
    pub(super) qkv: &'a [E],
    /// Output of the forward, `[T, H D]`.
    pub(super) o: &'a [E],
    /// Logarithms of the sums of exponentials, `[T, H]`.
    pub(super) lse: &'a [f32],
}

/// A query block of one head.
#[derive(Clone, Copy)]
struct QueryBlock<'a> {
    block: &'a Block,
    /// `[64, D padded]`.
    q: &'a [f32],
    /// `[64, D padded]`.
    d_o: &'a [f32],
    /// Logarithm of the sum of exponentials, per row.
    lse: &'a [f32],
    /// `Σ_d dO O`, per row.
    delta: &'a [f32],
}

/// A key block of one head.
#[derive(Clone, Copy)]
struct KeyBlock<'a> {
    /// Position of its first key.
    position: usize,
    /// `[64, D padded]`.
    k: &'a [f32],
    /// `[D, 64]`.
    k_transposed: &'a [f32],
    /// `[D, 64]`.
    v_transposed: &'a [f32],
}

/// Gradients of one head of one sequence, each `[blocks, 64, D padded]`.
struct Gradients<'a> {
    q: &'a mut [f32],
    k: &'a mut [f32],
    v: &'a mut [f32],
}

/// Writes the gradient of `qkv` to `dqkv [T, (H + 2K) D]`.
pub(super) fn backward<E: Element>(inputs: Inputs<E>, blocks: &[Block], spec: &AttentionSpec, dqkv: &mut [E]) {
    let (width, head_dim, heads, kv_heads) = (spec.qkv_width(), spec.head_dim, spec.heads, spec.kv_heads);
    let (key_column, value_column) = (heads * head_dim, (heads + kv_heads) * head_dim);
    let packed = Packed {
        k: pack(inputs.qkv, width, key_column, kv_heads, blocks, spec, Pack::Rows),
        k_transposed: pack(inputs.qkv, width, key_column, kv_heads, blocks, spec, Pack::Transposed),
        v_transposed: pack(inputs.qkv, width, value_column, kv_heads, blocks, spec, Pack::Transposed),
    };
    // `[sequence][head][q, k, v][block, 64, D padded]`: one slice per task.
    let size = rows_len(spec);
    let mut scratch = vec![0.0; blocks.len() * heads * 3 * size];
    let mut tasks = Vec::new();
    let mut rest = scratch.as_mut_slice();
    for sequence in blocks.chunk_by(|a, b| a.first == b.first) {
        for head in 0..heads {
            let (gradients, tail) = rest.split_at_mut(3 * sequence.len() * size);
            tasks.push((sequence, head, gradients));
            rest = tail;
        }
    }
    tasks.into_par_iter().for_each(|(sequence, head, gradients)| {
        let (q, rest) = gradients.split_at_mut(sequence.len() * size);
        let (k, v) = rest.split_at_mut(sequence.len() * size);
        head_gradients(sequence, head, inputs, &packed, spec, &mut Gradients { q, k, v });
    });
    join_heads(&scratch, blocks, spec, dqkv);
}

simd_fn! {
    fn row_dot(a: &[f32], b: &[f32]) -> f32 = dot;
}

/// Gradients of query head `head` of one sequence.
fn head_gradients<E: Element>(
    sequence: &[Block],
    head: usize,
    inputs: Inputs<E>,
    packed: &Packed,
    spec: &AttentionSpec,
    gradients: &mut Gradients,
) {
    let (size, transposed) = (rows_len(spec), transposed_len(spec));
    let (width, column, stride) = (spec.output_width(), head * spec.head_dim, padded(spec.head_dim));
    let (mut q, mut d_o) = (vec![0.0; sequence.len() * size], vec![0.0; sequence.len() * size]);
    let mut o = vec![0.0; size];
    let mut lse = vec![0.0; sequence.len() * BLOCK_KEYS];
    let mut delta = vec![0.0; sequence.len() * BLOCK_KEYS];
    for (n, block) in sequence.iter().enumerate() {
        let tokens = block.start()..block.start() + block.rows;
        let source = &inputs.qkv[tokens.start * spec.qkv_width()..tokens.end * spec.qkv_width()];
        copy_head(source, spec.qkv_width(), column, spec.head_dim, 0, &mut q[n * size..][..size]);
        let source = &inputs.d_o[tokens.start * width..tokens.end * width];
        copy_head(source, width, column, spec.head_dim, 0, &mut d_o[n * size..][..size]);
        copy_head(&inputs.o[tokens.start * width..tokens.end * width], width, column, spec.head_dim, 0, &mut o);
        for (row, token) in tokens.enumerate() {
            let columns = row * stride..row * stride + spec.head_dim;
            lse[n * BLOCK_KEYS + row] = inputs.lse[token * spec.heads + head];
            delta[n * BLOCK_KEYS + row] = row_dot(&d_o[n * size..][columns.clone()], &o[columns]);
        }
    }
    let (mut probabilities, mut d_scores) = ([[0.0; BLOCK_KEYS]; BLOCK_KEYS], [[0.0; BLOCK_KEYS]; BLOCK_KEYS]);
    for (n, keys) in sequence.iter().enumerate() {
        let index = (keys.first + n) * spec.kv_heads + head / spec.group();
        let key_block = KeyBlock {
            position: keys.position,
            k: &packed.k[index * size..][..size],
            k_transposed: &packed.k_transposed[index * transposed..][..transposed],
            v_transposed: &packed.v_transposed[index * transposed..][..transposed],
        };
        for (m, block) in sequence.iter().enumerate() {
            let last = block.position + block.rows - 1;
            let sees = spec.visible(block.position, block.len).0 < keys.position + keys.rows
                && spec.visible(last, block.len).1 > keys.position;
            if !sees {
                continue;
            }
            let query_block = QueryBlock {
                block,
                q: &q[m * size..][..size],
                d_o: &d_o[m * size..][..size],
                lse: &lse[m * BLOCK_KEYS..][..BLOCK_KEYS],
                delta: &delta[m * BLOCK_KEYS..][..BLOCK_KEYS],
            };
            block_gradients(
                query_block,
                key_block,
                spec,
                &mut probabilities,
                &mut d_scores,
                &mut gradients.q[m * size..][..size],
                &mut gradients.k[n * size..][..size],
                &mut gradients.v[n * size..][..size],
            );
        }
    }
}

/// Adds what one block of queries and one block of keys contribute to `dq`, `dk` and `dv`, each `[64, D padded]`.
fn block_gradients(
    queries: QueryBlock,
    keys: KeyBlock,
    spec: &AttentionSpec,
    probabilities: &mut Pair,
    d_scores: &mut Pair,
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
) {
    let rows = queries.block.rows;
    let whole = rows / TILE_ROWS * TILE_ROWS;
    for row in (0..whole).step_by(TILE_ROWS) {
        query_rows::<TILE_ROWS>(row, queries, keys, spec, probabilities, d_scores, dq);
    }
    for row in whole..rows {
        query_rows::<1>(row, queries, keys, spec, probabilities, d_scores, dq);
    }
    let stride = padded(spec.head_dim);
    let (q, d_o) = (Right { values: queries.q, stride }, Right { values: queries.d_o, stride });
    let (p, ds) = (probabilities.as_flattened(), d_scores.as_flattened());
    let key_count = (queries.block.len - keys.position).min(BLOCK_KEYS);
    for key in (0..key_count).step_by(TILE_ROWS) {
        let rows = seeing_rows(keys.position + key, queries.block, spec);
        product_transposed(&p[key..], d_o, rows.clone(), &mut dv[key * stride..]);
        product_transposed(&ds[key..], q, rows, &mut dk[key * stride..]);
    }
}

/// The rows of `block` that may see one of the keys `key..key + 4`; the others have probability zero.
fn seeing_rows(key: usize, block: &Block, spec: &AttentionSpec) -> Range<usize> {
    let from = if spec.causal { key.saturating_sub(block.position) } else { 0 };
    let to = spec.window.map_or(block.rows, |window| (key + TILE_ROWS - 1 + window).saturating_sub(block.position));
    from.min(block.rows)..to.clamp(from, block.rows.max(from))
}

/// Probabilities and score gradients of `R` (1 or 4) query rows from `row` on, and their `dq`.
fn query_rows<const R: usize>(
    row: usize,
    queries: QueryBlock,
    keys: KeyBlock,
    spec: &AttentionSpec,
    probabilities: &mut Pair,
    d_scores: &mut Pair,
    dq: &mut [f32],
) {
    let block = queries.block;
    let visible: [(usize, usize); R] = array::from_fn(|r| {
        let (start, end) = spec.visible(block.position + row + r, block.len);
        block_range(start, end, keys.position)
    });
    let (p, ds) = (&mut probabilities[row..row + R], &mut d_scores[row..row + R]);
    let Some(keys_seen) = union(&visible) else {
        p.as_flattened_mut().fill(0.0);
        ds.as_flattened_mut().fill(0.0);
        return;
    };
    let (head_dim, stride, columns) = (spec.head_dim, padded(spec.head_dim), whole_vectors(&keys_seen));
    let rows = |r: usize| (row + r) * stride..(row + r) * stride + head_dim;
    let (q, d_o): ([_; R], [_; R]) =
        (array::from_fn(|r| &queries.q[rows(r)]), array::from_fn(|r| &queries.d_o[rows(r)]));
    let k = Right { values: keys.k_transposed, stride: BLOCK_KEYS };
    product(q, k, 0..head_dim, p.as_flattened_mut(), BLOCK_KEYS, columns.clone(), false);
    let v = Right { values: keys.v_transposed, stride: BLOCK_KEYS };
    product(d_o, v, 0..head_dim, ds.as_flattened_mut(), BLOCK_KEYS, columns.clone(), false);
    for r in 0..R {
        let (lse, delta) = (queries.lse[row + r], queries.delta[row + r]);
        score_gradients(&mut p[r], &mut ds[r], columns.clone(), visible[r], spec.scale, lse, delta);
    }
    let k = Right { values: keys.k, stride };
    product(array::from_fn::<_, R, _>(|r| &ds[r][..]), k, keys_seen, &mut dq[row * stride..], stride, 0..stride, true);
}

simd_fn! {
    /// Turns the `columns` of a row of scores into probabilities, and of probability gradients into score gradients; hidden
    /// keys, those not in `from..to`, into 0.
    fn score_gradients(
        scores: &mut [f32; BLOCK_KEYS], gradients: &mut [f32; BLOCK_KEYS], columns: Range<usize>,
        visible: (usize, usize), scale: f32, lse: f32, delta: f32,
    ) = score_gradients_body;
}

#[inline(always)]
fn score_gradients_body<const FMA: bool>(
    scores: &mut [f32; BLOCK_KEYS],
    gradients: &mut [f32; BLOCK_KEYS],
    columns: Range<usize>,
    (from, to): (usize, usize),
    scale: f32,
    lse: f32,
    delta: f32,
) {
    let (scores_in, _) = scores[columns.clone()].as_chunks_mut::<LANES>();
    let (gradients_in, _) = gradients[columns].as_chunks_mut::<LANES>();
    for (score, gradient) in scores_in.iter_mut().zip(gradients_in) {
        for lane in 0..LANES {
            let p = exp::<FMA>(fma::<FMA>(score[lane], scale, -lse));
            score[lane] = p;
            gradient[lane] = p * (gradient[lane] - delta) * scale;
        }
    }
    let to = to.max(from);
    for row in [scores, gradients] {
        row[..from].fill(0.0);
        row[to..].fill(0.0);
    }
}

/// Copies the gradients of all heads to their columns of `dqkv`, summing key-value heads over their group in order.
fn join_heads<E: Element>(scratch: &[f32], blocks: &[Block], spec: &AttentionSpec, dqkv: &mut [E]) {
    let (heads, head_dim, width, stride) = (spec.heads, spec.head_dim, spec.qkv_width(), padded(spec.head_dim));
    let size = rows_len(spec);
    let mut tasks = Vec::with_capacity(blocks.len());
    let mut rest = dqkv;
    for block in blocks {
        let (rows, tail) = rest.split_at_mut(block.rows * width);
        tasks.push((block, rows));
        rest = tail;
    }
    tasks.into_par_iter().for_each(|(block, rows)| {
        let count = block.len.div_ceil(BLOCK_KEYS);
        let n = block.position / BLOCK_KEYS;
        // Head `head`'s gradient of `part` (q, k or v), row `row`.
        let gradient = |head: usize, part: usize, row: usize| {
            let start = (block.first * heads + head * count) * 3 * size + (part * count + n) * size + row * stride;
            &scratch[start..start + head_dim]
        };
        let mut total = vec![0.0; head_dim];
        for (row, out) in rows.chunks_exact_mut(width).enumerate() {
            let (q, kv) = out.split_at_mut(heads * head_dim);
            for (head, q) in q.chunks_exact_mut(head_dim).enumerate() {
                q.iter_mut().zip(gradient(head, 0, row)).for_each(|(q, value)| *q = E::narrow(*value));
            }
            for (i, out) in kv.chunks_exact_mut(head_dim).enumerate() {
                let (part, kv_head) = (1 + i / spec.kv_heads, i % spec.kv_heads);
                let first = kv_head * spec.group();
                total.copy_from_slice(gradient(first, part, row));
                for head in first + 1..first + spec.group() {
                    for (total, value) in total.iter_mut().zip(gradient(head, part, row)) {
                        *total += value;
                    }
                }
                out.iter_mut().zip(&total).for_each(|(out, value)| *out = E::narrow(*value));
            }
        }
    });
}
