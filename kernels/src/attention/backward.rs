//! The backward: probabilities are recomputed block by block from the saved sums.
//!
//! A task is one key-value head of one sequence. It takes the query heads that read it in order; for each, the key blocks
//! in order; and for each of these, the tiles of queries that see it in order: so every gradient has one owner and one
//! order of summation.

use std::ops::Range;

use super::blocks::{Block, HeadRows, copy_head, pack, padded};
use super::multiply::{Left, ROWS, multiply};
use super::queries::{Gathered, Lanes, QueryTile, TILE_QUERIES, VECTORS, lanes};
use super::tasks::{self, Ahead, Lines, Task};
use super::tile::Right;
#[cfg(target_arch = "x86_64")]
use super::vector;
use super::{AttentionSpec, BLOCK_KEYS};
use crate::element::Element;
use crate::gemm::{Output, transpose};
use crate::math::{LANES, dot, exp};
use crate::room::Room;
use crate::simd::{Isa, fma, simd_fn};

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

impl<E: Element> Inputs<'_, E> {
    /// Bytes that a key-value head takes of a row, read and written.
    pub(super) fn row_bytes(&self, spec: &AttentionSpec) -> usize {
        4 * (spec.group() + 1) * spec.head_dim * size_of::<E>()
    }

    /// What a task reads, and what it writes of `dqkv`.
    pub(super) fn lines(&self, task: &Task, dqkv: *const E, spec: &AttentionSpec) -> Vec<Lines> {
        let mut lines = vec![task.query_lines(self.lse.as_ptr(), spec.heads, 1, spec)];
        for (start, width) in
            [(self.qkv, spec.qkv_width()), (self.d_o, spec.output_width()), (self.o, spec.output_width())]
        {
            lines.push(task.query_lines(start.as_ptr(), width, spec.head_dim, spec));
        }
        lines.extend(task.key_lines(self.qkv.as_ptr(), spec));
        lines.push(task.query_lines(dqkv, spec.qkv_width(), spec.head_dim, spec).writing());
        lines.extend(task.key_lines(dqkv, spec).map(Lines::writing));
        lines
    }
}

/// A tile of queries of one head.
struct Queries {
    tile: QueryTile,
    q: Gathered,
    d_o: Gathered,
    /// Logarithm of the sum of exponentials, per query.
    lse: Lanes,
    /// `Σ_d dO O`, per query.
    delta: Lanes,
    /// Gradient of `q`, `[D padded, 32]`.
    dq: Room,
}

/// A key block of one head.
#[derive(Clone, Copy)]
struct KeyBlock<'a> {
    /// Position of its first key.
    position: usize,
    /// `[64, D padded]`.
    k: &'a [f32],
    /// `[64, D padded]`.
    v: &'a [f32],
}

/// What a task works in.
#[derive(Default)]
struct Scratch {
    /// The queries of a head.
    tiles: Vec<Queries>,
    keys: Room,
    values: Room,
    /// `P` and `dS`, `[64, 32]`.
    pair: [Room; 2],
    /// Gradients of keys and values of one query head, `[blocks, 64, D padded]`.
    head: [Room; 2],
    /// Their sums over the query heads so far.
    total: [Room; 2],
    /// Gradient of a tile of queries by rows, `[32, D padded]`.
    rows: Room,
}

/// Writes the gradient of `qkv` to `dqkv [T, (H + 2K) D]`.
pub(super) fn backward<E: Element>(inputs: Inputs<E>, blocks: &[Block], spec: &AttentionSpec, dqkv: Output<'_, E>) {
    let tasks = tasks::cut(blocks, spec, inputs.row_bytes(spec), false);
    let dqkv = HeadRows::new(dqkv, spec.qkv_width(), spec.head_dim);
    let lines = |task: &Task| inputs.lines(task, dqkv.start(), spec);
    let tiles_of_block = BLOCK_KEYS / TILE_QUERIES;
    let columns = padded(spec.head_dim).div_ceil(2 * LANES);
    // Tiles of the five products of a block of keys and a tile of queries.
    let tiles = (2 * BLOCK_KEYS + padded(spec.head_dim) + 2 * BLOCK_KEYS * columns) / ROWS;
    let steps = |task: &Task| task.pairs(spec) * tiles_of_block * tiles;
    tasks::run(&tasks, Scratch::default, lines, steps, |task, scratch, ahead| {
        for kv_head in task.kv_heads.clone() {
            group_gradients(task.sequence, kv_head, inputs, spec, scratch, &dqkv, ahead);
        }
    });
}

/// Gradients of a key-value head of one sequence and of the query heads that read it.
fn group_gradients<E: Element>(
    sequence: &[Block],
    kv_head: usize,
    inputs: Inputs<E>,
    spec: &AttentionSpec,
    scratch: &mut Scratch,
    dqkv: &HeadRows<E>,
    ahead: &mut Ahead,
) {
    let (width, head_dim, stride) = (spec.qkv_width(), spec.head_dim, padded(spec.head_dim));
    let key_column = (spec.heads + kv_head) * head_dim;
    let columns = [key_column, key_column + spec.kv_heads * head_dim];
    let Scratch { tiles, keys, values, pair: [p, ds], head: gradients, total, rows } = scratch;
    let keys = pack(inputs.qkv, width, columns[0], head_dim, sequence, keys);
    let values = pack(inputs.qkv, width, columns[1], head_dim, sequence, values);
    let pair = (p.first(BLOCK_KEYS * TILE_QUERIES), ds.first(BLOCK_KEYS * TILE_QUERIES));
    let rows = rows.first(TILE_QUERIES * stride);
    for head in kv_head * spec.group()..(kv_head + 1) * spec.group() {
        // The first head's are the sum so far.
        let into = if head == kv_head * spec.group() { &mut *total } else { &mut *gradients };
        let [dk, dv] = into.each_mut().map(|room| room.first(keys.len()));
        dk.fill(0.0);
        dv.fill(0.0);
        let count = gather_queries(sequence, head, inputs, spec, tiles);
        let tiles = &mut tiles[..count];
        head_gradients(sequence, tiles, (keys, values), spec, (&mut *pair.0, &mut *pair.1), dk, dv, ahead);
        for queries in tiles {
            transpose(&queries.dq, TILE_QUERIES, stride, TILE_QUERIES, stride, rows);
            let tile = &queries.tile;
            // SAFETY: the heads of a sequence belong to one task.
            unsafe { dqkv.write(tile.token, tile.rows, head * head_dim, rows, stride) };
        }
        if head > kv_head * spec.group() {
            for (total, gradient) in total.iter_mut().zip(&*gradients) {
                total.iter_mut().zip(&**gradient).for_each(|(total, gradient)| *total += gradient);
            }
        }
    }
    for (total, column) in total.iter().zip(columns) {
        for (block, rows) in sequence.iter().zip(total.chunks_exact(BLOCK_KEYS * stride)) {
            // SAFETY: as above.
            unsafe { dqkv.write(block.start(), block.rows, column, rows, stride) };
        }
    }
}

simd_fn! {
    fn row_dot(a: &[f32], b: &[f32]) -> f32 = dot;
}

/// Gathers the queries of a head of a sequence into the first of `tiles`; returns how many.
fn gather_queries<E: Element>(
    sequence: &[Block],
    head: usize,
    inputs: Inputs<E>,
    spec: &AttentionSpec,
    tiles: &mut Vec<Queries>,
) -> usize {
    let mut count = 0;
    for tile in sequence.iter().flat_map(|block| QueryTile::of(block, spec)) {
        if count == tiles.len() {
            tiles.push(Queries::new(tile, spec));
        }
        tiles[count].gather(tile, head, inputs, spec);
        count += 1;
    }
    count
}

/// Adds to `dk` and `dv` what the queries of one head of a sequence contribute, and to the queries their gradients.
fn head_gradients(
    sequence: &[Block],
    tiles: &mut [Queries],
    (keys, values): (&[f32], &[f32]),
    spec: &AttentionSpec,
    (probabilities, d_scores): (&mut [f32], &mut [f32]),
    dk: &mut [f32],
    dv: &mut [f32],
    ahead: &mut Ahead,
) {
    let size = BLOCK_KEYS * padded(spec.head_dim);
    for (n, block) in sequence.iter().enumerate() {
        let part = n * size..(n + 1) * size;
        let key_block = KeyBlock { position: block.position, k: &keys[part.clone()], v: &values[part.clone()] };
        let (dk, dv) = (&mut dk[part.clone()], &mut dv[part]);
        for queries in &mut *tiles {
            block_gradients(queries, key_block, spec, probabilities, d_scores, dk, dv, ahead);
        }
    }
}

impl Queries {
    fn new(tile: QueryTile, spec: &AttentionSpec) -> Self {
        let (q, d_o) = (Gathered::new(spec.head_dim), Gathered::new(spec.head_dim));
        let zeros = [[0.0; LANES]; VECTORS];
        let dq = Room::zeros(padded(spec.head_dim) * TILE_QUERIES);
        Self { tile, q, d_o, lse: zeros, delta: zeros, dq }
    }

    /// Gathers a tile of head `head`, with no gradient so far.
    fn gather<E: Element>(&mut self, tile: QueryTile, head: usize, inputs: Inputs<E>, spec: &AttentionSpec) {
        let (head_dim, stride, width) = (spec.head_dim, padded(spec.head_dim), spec.output_width());
        self.tile = tile;
        self.q.gather(&tile, inputs.qkv, spec.qkv_width(), head * head_dim, head_dim);
        self.d_o.gather(&tile, inputs.d_o, width, head * head_dim, head_dim);
        (self.lse, self.delta) = ([[0.0; LANES]; VECTORS], [[0.0; LANES]; VECTORS]);
        // The room of the gradient first holds the output.
        let source = &inputs.o[tile.token * width..][..tile.rows * width];
        copy_head(source, width, head * head_dim, head_dim, 0, &mut self.dq);
        for row in 0..tile.rows {
            let columns = row * stride..row * stride + head_dim;
            self.lse[row / LANES][row % LANES] = inputs.lse[(tile.token + row) * spec.heads + head];
            self.delta[row / LANES][row % LANES] = row_dot(&self.d_o.rows[columns.clone()], &self.dq[columns]);
        }
        self.dq.fill(0.0);
    }
}

/// Adds what a tile of queries and a block of keys contribute to `dq` of the queries and to `dk` and `dv`, each
/// `[64, D padded]`.
fn block_gradients(
    queries: &mut Queries,
    keys: KeyBlock,
    spec: &AttentionSpec,
    probabilities: &mut [f32],
    d_scores: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
    ahead: &mut Ahead,
) {
    let seen = queries.tile.keys(keys.position);
    if seen.is_empty() {
        return;
    }
    let (head_dim, stride, rows) = (spec.head_dim, padded(spec.head_dim), queries.tile.rows);
    let whole = seen.start / ROWS * ROWS..seen.end.next_multiple_of(ROWS);
    let by_key = |values| Left { values, row: stride, step: 1 };
    let lanes = |values| Right { values, stride: TILE_QUERIES };
    let (q, d_o) = (lanes(&queries.q.lanes), lanes(&queries.d_o.lanes));
    multiply(by_key(keys.k), whole.clone(), q, 0..head_dim, probabilities, TILE_QUERIES, TILE_QUERIES, false, ahead);
    multiply(by_key(keys.v), whole.clone(), d_o, 0..head_dim, d_scores, TILE_QUERIES, TILE_QUERIES, false, ahead);
    score_gradients(probabilities, d_scores, whole.clone(), keys.position, queries, spec.scale);
    let k = Left { values: keys.k, row: 1, step: stride };
    multiply(k, 0..stride, lanes(d_scores), seen, &mut queries.dq, TILE_QUERIES, TILE_QUERIES, true, ahead);
    let over_queries = |values| Left { values, row: TILE_QUERIES, step: 1 };
    let (q, d_o) = (Right { values: &queries.q.rows, stride }, Right { values: &queries.d_o.rows, stride });
    multiply(over_queries(probabilities), whole.clone(), d_o, 0..rows, dv, stride, stride, true, ahead);
    multiply(over_queries(d_scores), whole, q, 0..rows, dk, stride, stride, true, ahead);
}

/// Turns scores `[64, 32]` of the `keys` of the block that starts at key `start` into probabilities, and gradients of
/// probabilities into those of scores; where a query does not see the key, into 0.
fn score_gradients(
    scores: &mut [f32],
    gradients: &mut [f32],
    keys: Range<usize>,
    start: usize,
    queries: &Queries,
    scale: f32,
) {
    let first = start + keys.start;
    let (scores, gradients) = (&mut lanes(scores)[keys.clone()], &mut lanes(gradients)[keys]);
    let (lse, delta) = (&queries.lse, &queries.delta);
    #[cfg(target_arch = "x86_64")]
    if Isa::active() >= Isa::Avx512 {
        // SAFETY: AVX-512 is active.
        return unsafe { vector::score_gradients(scores, gradients, first, &queries.tile, (lse, delta), scale) };
    }
    for (row, (scores, gradients)) in scores.iter_mut().zip(gradients).enumerate() {
        let (scores, gradients) = (scores.as_flattened_mut(), gradients.as_flattened_mut());
        row_gradients(scores, gradients, lse.as_flattened(), delta.as_flattened(), scale);
        let seeing = queries.tile.seeing(first + row);
        for row in [scores, gradients] {
            row[..seeing.start].fill(0.0);
            row[seeing.end.max(seeing.start)..].fill(0.0);
        }
    }
}

simd_fn! {
    fn row_gradients(scores: &mut [f32], gradients: &mut [f32], lse: &[f32], delta: &[f32], scale: f32) = row_gradients_body;
}

#[inline(always)]
fn row_gradients_body<const FMA: bool>(
    scores: &mut [f32],
    gradients: &mut [f32],
    lse: &[f32],
    delta: &[f32],
    scale: f32,
) {
    for (((score, gradient), lse), delta) in scores.iter_mut().zip(gradients).zip(lse).zip(delta) {
        *score = exp::<FMA>(fma::<FMA>(*score, scale, -lse));
        *gradient = *score * (*gradient - delta) * scale;
    }
}
