//! The backward on tiles: one task per key-value head of a sequence, so that every sum has one owner and one order.
//!
//! For each query head, key blocks in order and, for each, the query blocks that see it in chunks of [`CHUNK`]: `dV` and
//! `dK` take up a chunk in one chain, `dQ` (kept transposed) a key block.

use std::arch::x86_64::*;
use std::array;
use std::f32::consts::LOG2_E;
use std::mem::MaybeUninit;

use half::bf16;

use super::super::backward::Inputs;
use super::super::blocks::Block;
use super::super::layout::padded_pairs;
use super::super::tasks::{self, Ahead, Task};
use super::product::{COLUMNS, Left, Pairs, STEP, product};
use super::scores::{Factors, Keys, Products, Queries, STEPS};
use super::vector::{dot, load, pack_pairs, pack_rows, pack_transposed, range_mask, store_rounded};
use super::vector::{transpose_f32, transpose_pairs};
use super::{AttentionSpec, BLOCK_KEYS, Head, Room, block_len, part};
use crate::amx::Tiles;
use crate::gemm::Output;
use crate::math::LANES;

/// Query blocks whose probabilities are kept at once.
const CHUNK: usize = 4;

/// Queries of a chunk.
const CHUNK_ROWS: usize = CHUNK * BLOCK_KEYS;

/// The blocks of one sequence, for one head; each matrix is `[blocks, 64 · D padded]`.
struct Packed {
    k: Room<bf16>,
    v: Room<bf16>,
    k_transposed: Room<bf16>,
    /// For the scores.
    q_transposed: Room<bf16>,
    d_o_transposed: Room<bf16>,
    /// For `dK` and `dV`.
    q_pairs: Room<bf16>,
    d_o_pairs: Room<bf16>,
    /// `[blocks, 64]`.
    minus_lse: Room<f32>,
    delta: Room<f32>,
}

/// Sums of one sequence, without the scale of the scores.
struct Sums {
    /// `[blocks, D padded, 64]`.
    dq: Room<f32>,
    /// `[blocks, 64, D padded]`.
    dk: Room<f32>,
    dv: Room<f32>,
}

/// What a task works with, for sequences of up to so many blocks.
struct Workspace {
    packed: Packed,
    sums: Sums,
    products: Products,
    /// Keys on their way to being transposed.
    pairs: Room<bf16>,
    /// Probabilities of a key block and a chunk of queries, `[64, CHUNK_ROWS]`.
    p: Room<bf16>,
    /// Score gradients, likewise.
    ds: Room<bf16>,
    /// Score gradients of one pair of blocks, `[32, 64, 2]`.
    ds_pairs: Room<bf16>,
}

impl Workspace {
    fn new(blocks: usize, spec: &AttentionSpec) -> Self {
        let len = block_len(spec);
        let room = || Room::new(blocks * len);
        let rows = || Room::new(blocks * BLOCK_KEYS);
        let sums = || Room::new(blocks * len);
        Self {
            packed: Packed {
                k: room(),
                v: room(),
                k_transposed: room(),
                q_transposed: room(),
                d_o_transposed: room(),
                q_pairs: room(),
                d_o_pairs: room(),
                minus_lse: rows(),
                delta: rows(),
            },
            sums: Sums { dq: sums(), dk: sums(), dv: sums() },
            products: Products::new(),
            pairs: Room::new(len),
            p: Room::new(BLOCK_KEYS * CHUNK_ROWS),
            ds: Room::new(BLOCK_KEYS * CHUNK_ROWS),
            ds_pairs: Room::new(BLOCK_KEYS * BLOCK_KEYS),
        }
    }
}

/// Writes the gradient of `qkv` to `dqkv [T, (H + 2K) D]`.
pub(in super::super) fn backward(inputs: Inputs<bf16>, blocks: &[Block], spec: &AttentionSpec, dqkv: Output<'_, bf16>) {
    let tasks = tasks::cut(blocks, spec, inputs.row_bytes(spec), false);
    let longest = tasks.iter().map(|task| task.sequence.len()).max().unwrap_or(0);
    let lines = |task: &Task| inputs.lines(task, dqkv.start(), spec);
    let steps = |task: &Task| task.pairs(spec) * STEPS;
    tasks::run(
        &tasks,
        || Workspace::new(longest, spec),
        lines,
        steps,
        |task, workspace, ahead| {
            for kv_head in task.kv_heads.clone() {
                // SAFETY: this path is taken only where the processor has tiles and their AVX-512.
                unsafe { head_gradients(task.sequence, kv_head, inputs, spec, workspace, &dqkv, ahead) };
            }
        },
    );
}

/// Gradients of a key-value head of one sequence and of the query heads that read it.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn head_gradients(
    sequence: &[Block],
    kv_head: usize,
    inputs: Inputs<bf16>,
    spec: &AttentionSpec,
    workspace: &mut Workspace,
    dqkv: &Output<'_, bf16>,
    ahead: &mut Ahead,
) {
    let Some(tiles) = Tiles::new() else { unreachable!("the path of tiles without tiles") };
    let (len, chunk) = (block_len(spec), CHUNK);
    let Workspace { packed, sums, products, pairs, p, ds, ds_pairs } = workspace;
    sums.dk[..sequence.len() * len].fill(0.0);
    sums.dv[..sequence.len() * len].fill(0.0);
    packed.keys(sequence, kv_head, inputs, spec, pairs);
    for head in kv_head * spec.group()..(kv_head + 1) * spec.group() {
        packed.queries(sequence, head, inputs, spec);
        sums.dq[..sequence.len() * len].fill(0.0);
        for (n, key_block) in sequence.iter().enumerate() {
            let seeing = seeing_blocks(n, key_block, spec);
            for first in seeing.clone().step_by(chunk) {
                let last = seeing.end.min(first + chunk);
                for m in first..last {
                    let at = (m - first) * BLOCK_KEYS;
                    let (p, ds) = (&mut p[at..], &mut ds[at..]);
                    let mut factors = Factors { p, ds, stride: chunk * BLOCK_KEYS, ds_pairs };
                    let visible = array::from_fn(|key| seeing_rows(key_block.position + key, &sequence[m], spec));
                    let (keys, queries) = (packed.key(n, len), packed.query(m, len));
                    products.factors(&tiles, keys, queries, &visible, spec, &mut factors, ahead);
                    sums.add_queries(&tiles, m, packed.key(n, len).k_transposed, ds_pairs, len);
                }
                sums.add_keys(&tiles, n, (first, last), (p, ds, chunk * BLOCK_KEYS), packed, len);
            }
        }
        for (m, block) in sequence.iter().enumerate() {
            let target = Target { dqkv, block, column: head * spec.head_dim, spec };
            target.transposed(&sums.dq[m * len..][..len]);
        }
    }
    for (n, block) in sequence.iter().enumerate() {
        let column = |head: usize| head * spec.head_dim;
        let target = Target { dqkv, block, column: column(spec.heads + kv_head), spec };
        target.rows(&sums.dk[n * len..][..len], spec.scale);
        let target = Target { dqkv, block, column: column(spec.heads + spec.kv_heads + kv_head), spec };
        target.rows(&sums.dv[n * len..][..len], 1.0);
    }
}

/// The blocks of queries that see a key of block `n`.
fn seeing_blocks(n: usize, keys: &Block, spec: &AttentionSpec) -> std::ops::Range<usize> {
    let blocks = keys.len.div_ceil(BLOCK_KEYS);
    let from = if spec.causal { n } else { 0 };
    // The last key is seen by the queries before `last + window`.
    let last = keys.position + keys.rows - 1;
    let to = spec.window.map_or(blocks, |window| (last + window).div_ceil(BLOCK_KEYS));
    from..to.min(blocks)
}

/// The rows of `block` that see key `key` of its sequence, as bits.
fn seeing_rows(key: usize, block: &Block, spec: &AttentionSpec) -> u64 {
    if key >= block.len {
        return 0;
    }
    let from = if spec.causal { key.saturating_sub(block.position) } else { 0 };
    let to = spec.window.map_or(block.rows, |window| (key + window).saturating_sub(block.position).min(block.rows));
    if from < to { range_mask(from, to) } else { 0 }
}

impl Packed {
    /// Packs the keys and values of `kv_head`; `pairs` is room for a block.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn keys(
        &mut self,
        sequence: &[Block],
        kv_head: usize,
        inputs: Inputs<bf16>,
        spec: &AttentionSpec,
        pairs: &mut [bf16],
    ) {
        let len = block_len(spec);
        for (n, block) in sequence.iter().enumerate() {
            let at = n * len..(n + 1) * len;
            let key = Head::of(inputs.qkv, spec.qkv_width(), block, spec.heads + kv_head, spec);
            pack_rows(key, &mut self.k[at.clone()]);
            pack_pairs(key, pairs);
            transpose_pairs(pairs, &mut self.k_transposed[at.clone()]);
            let value = Head::of(inputs.qkv, spec.qkv_width(), block, spec.heads + spec.kv_heads + kv_head, spec);
            pack_rows(value, &mut self.v[at]);
        }
    }

    /// Packs query head `number`, its output gradients and sums.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn queries(&mut self, sequence: &[Block], number: usize, inputs: Inputs<bf16>, spec: &AttentionSpec) {
        let len = block_len(spec);
        for (m, block) in sequence.iter().enumerate() {
            let at = m * len..(m + 1) * len;
            let q = Head::of(inputs.qkv, spec.qkv_width(), block, number, spec);
            let d_o = Head::of(inputs.d_o, spec.output_width(), block, number, spec);
            let o = Head::of(inputs.o, spec.output_width(), block, number, spec);
            pack_transposed(q, &mut self.q_transposed[at.clone()]);
            pack_transposed(d_o, &mut self.d_o_transposed[at.clone()]);
            pack_pairs(q, &mut self.q_pairs[at.clone()]);
            pack_pairs(d_o, &mut self.d_o_pairs[at]);
            for row in 0..block.rows {
                let lse = inputs.lse[(block.start() + row) * spec.heads + number];
                self.minus_lse[m * BLOCK_KEYS + row] = -lse * LOG2_E;
                self.delta[m * BLOCK_KEYS + row] = dot(d_o.row(row), o.row(row));
            }
        }
    }

    fn key(&self, n: usize, len: usize) -> Keys<'_> {
        let at = n * len..(n + 1) * len;
        Keys { k: &self.k[at.clone()], v: &self.v[at.clone()], k_transposed: &self.k_transposed[at] }
    }

    fn query(&self, m: usize, len: usize) -> Queries<'_> {
        let (at, rows) = (m * len..(m + 1) * len, m * BLOCK_KEYS..(m + 1) * BLOCK_KEYS);
        Queries {
            q: &self.q_transposed[at.clone()],
            d_o: &self.d_o_transposed[at],
            minus_lse: &self.minus_lse[rows.clone()],
            delta: &self.delta[rows],
        }
    }
}

impl Sums {
    /// `dQᵀ += Kᵀ dSᵀ` of query block `m` and one key block.
    fn add_queries(&mut self, tiles: &Tiles, m: usize, k_transposed: &[bf16], ds_pairs: &[bf16], len: usize) {
        let dq = &mut self.dq[m * len..][..len];
        for d in (0..len / BLOCK_KEYS).step_by(32) {
            let k = Left { values: &k_transposed[d * BLOCK_KEYS..], stride: BLOCK_KEYS };
            for query in (0..BLOCK_KEYS).step_by(COLUMNS) {
                let ds = Pairs { values: &ds_pairs[query * 2..], stride: BLOCK_KEYS };
                let dq = &mut dq[d * BLOCK_KEYS + query..];
                product::<32>(tiles, k, ds, BLOCK_KEYS / STEP, dq, BLOCK_KEYS, true);
            }
        }
    }

    /// `dV += Pᵀ dO` and `dK += dSᵀ Q` of key block `n` and the query blocks `first..last`.
    fn add_keys(
        &mut self,
        tiles: &Tiles,
        n: usize,
        (first, last): (usize, usize),
        (p, ds, pitch): (&[bf16], &[bf16], usize),
        packed: &Packed,
        len: usize,
    ) {
        let (stride, steps) = (len / BLOCK_KEYS, (last - first) * BLOCK_KEYS / STEP);
        let products = [(p, &packed.d_o_pairs, &mut self.dv), (ds, &packed.q_pairs, &mut self.dk)];
        for (left, right, sums) in products {
            let (right, sums) = (&right[first * len..last * len], &mut sums[n * len..][..len]);
            for key in (0..BLOCK_KEYS).step_by(32) {
                let left = Left { values: &left[key * pitch..], stride: pitch };
                for d in (0..stride).step_by(COLUMNS) {
                    let right = Pairs { values: &right[d * 2..], stride };
                    product::<32>(tiles, left, right, steps, &mut sums[key * stride + d..], stride, true);
                }
            }
        }
    }
}

/// A head of a block's rows in the result.
struct Target<'a> {
    dqkv: &'a Output<'a, bf16>,
    block: &'a Block,
    column: usize,
    spec: &'a AttentionSpec,
}

impl<'a> Target<'a> {
    /// The head's columns of `row`.
    ///
    /// # Safety
    /// The task must own the head of this sequence.
    #[inline(always)]
    unsafe fn row(&self, row: usize) -> &'a mut [MaybeUninit<bf16>] {
        let start = (self.block.start() + row) * self.spec.qkv_width() + self.column;
        // SAFETY: by contract.
        unsafe { part(self.dqkv, start, self.spec.head_dim) }
    }

    /// Writes `factor` times sums `[64, D padded]`.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn rows(&self, sums: &[f32], factor: f32) {
        let factor = _mm512_set1_ps(factor);
        for (row, sums) in sums.chunks_exact(padded_pairs(self.spec.head_dim)).enumerate().take(self.block.rows) {
            // SAFETY: a head of a sequence belongs to one task.
            let out = unsafe { self.row(row) };
            for (out, sums) in out.chunks_mut(2 * LANES).zip(sums.chunks_exact(2 * LANES)) {
                store_rounded(out, [load(sums), load(&sums[LANES..])].map(|sums| _mm512_mul_ps(sums, factor)));
            }
        }
    }

    /// Writes the scale of the scores times sums `[D padded, 64]`.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn transposed(&self, sums: &[f32]) {
        let scale = _mm512_set1_ps(self.spec.scale);
        for first in (0..self.block.rows).step_by(LANES) {
            for d in (0..self.spec.head_dim).step_by(2 * LANES) {
                let rows = [d, d + LANES].map(|d| transpose_f32(&sums[d * BLOCK_KEYS + first..], BLOCK_KEYS));
                for row in 0..LANES.min(self.block.rows - first) {
                    // SAFETY: a head of a sequence belongs to one task.
                    let out = unsafe { self.row(first + row) };
                    let end = out.len().min(d + 2 * LANES);
                    store_rounded(&mut out[d..end], rows.map(|rows| _mm512_mul_ps(rows[row], scale)));
                }
            }
        }
    }
}
