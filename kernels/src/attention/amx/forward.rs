//! The forward on tiles: 32 query rows at a time against blocks of keys, with a running softmax.

use std::arch::x86_64::*;
use std::array;
use std::f32::consts::{LN_2, LOG2_E};

use half::bf16;
use rayon::prelude::*;

use super::super::blocks::Block;
use super::super::forward::block_range;
use super::super::layout::padded_pairs;
use super::product::{COLUMNS, Left, Pairs, STEP, product};
use super::vector::store_rounded;
use super::vector::{exp2, load, pack_pairs, pack_rows, pack_transposed, range_mask, round_two, store_512};
use super::{AttentionSpec, BLOCK_KEYS, Head, Room, Shared, block_len};
use crate::amx::Tiles;
use crate::math::{LANES, ln};

/// Running softmax of `ROWS` (16 or 32) query rows; exponentials are powers of two.
pub(super) struct Running<const ROWS: usize> {
    /// Largest score so far, per row, in powers of two.
    maximum: [f32; ROWS],
    /// Sum of `2^(score - maximum)` by lanes, `[ROWS, 16]`.
    sums: Room<f32>,
    /// Unnormalised output, `[ROWS, D padded]`.
    pub(super) output: Room<f32>,
    /// `[ROWS, 64]`.
    pub(super) scores: Room<f32>,
    /// `[ROWS, 64]`.
    pub(super) probabilities: Room<bf16>,
}

impl<const ROWS: usize> Running<ROWS> {
    pub(super) fn new(spec: &AttentionSpec) -> Self {
        Self {
            maximum: [0.0; ROWS],
            sums: Room::new(ROWS * LANES),
            output: Room::new(ROWS * padded_pairs(spec.head_dim)),
            scores: Room::new(ROWS * BLOCK_KEYS),
            probabilities: Room::new(ROWS * BLOCK_KEYS),
        }
    }

    /// Forgets everything.
    pub(super) fn start(&mut self) {
        self.maximum.fill(f32::NEG_INFINITY);
        self.sums.fill(0.0);
        self.output.fill(0.0);
    }

    /// Attends the rows `q [ROWS, D padded]` to a block of keys, of which row `r` sees the bits of `visible[r]`.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) fn attend(
        &mut self,
        tiles: &Tiles,
        q: &[bf16],
        keys: &[bf16],
        values: &[bf16],
        visible: &[u64; ROWS],
        scale: f32,
    ) {
        let seen = visible.iter().fold(0, |seen, row| seen | row);
        if seen == 0 {
            return;
        }
        // Halves of the block: 32 keys.
        let (from, to) = (usize::from(seen as u32 == 0), 1 + usize::from(seen >> 32 != 0));
        let stride = q.len() / ROWS;
        for half in from..to {
            let keys = Pairs { values: &keys[half * COLUMNS * 2..], stride: BLOCK_KEYS };
            let scores = &mut self.scores[half * COLUMNS..];
            product::<ROWS>(tiles, Left { values: q, stride }, keys, stride / STEP, scores, BLOCK_KEYS, false);
        }
        for row in 0..ROWS {
            self.softmax(row, visible[row], scale * LOG2_E);
        }
        let probabilities = Left { values: &self.probabilities[from * STEP..], stride: BLOCK_KEYS };
        for column in (0..stride).step_by(COLUMNS) {
            let values = Pairs { values: &values[(from * STEP / 2 * stride + column) * 2..], stride };
            product::<ROWS>(tiles, probabilities, values, to - from, &mut self.output[column..], stride, true);
        }
    }

    /// Turns a row of scores into `2^(scale · score - maximum)`, hidden keys into 0, rounded; updates maximum and sum.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) fn softmax(&mut self, row: usize, visible: u64, scale: f32) {
        let probabilities = &mut self.probabilities[row * BLOCK_KEYS..][..BLOCK_KEYS];
        if visible == 0 {
            probabilities.fill(bf16::ZERO);
            return;
        }
        let scores = &self.scores[row * BLOCK_KEYS..][..BLOCK_KEYS];
        let hidden = _mm512_set1_ps(f32::NEG_INFINITY);
        let mut vectors = [hidden; BLOCK_KEYS / LANES];
        for (n, vector) in vectors.iter_mut().enumerate() {
            let seen = (visible >> (n * LANES)) as __mmask16;
            *vector = _mm512_mask_mov_ps(hidden, seen, load(&scores[n * LANES..]));
        }
        let [a, b, c, d] = vectors;
        let largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(a, b), _mm512_max_ps(c, d))) * scale;
        let old = self.maximum[row];
        let new = if largest > old { largest } else { old };
        // All scores -inf: any finite number will do.
        let base = if new == f32::NEG_INFINITY { 0.0 } else { new };
        let (scale, minus_base) = (_mm512_set1_ps(scale), _mm512_set1_ps(-base));
        let mut sum = _mm512_setzero_ps();
        for (n, vector) in vectors.iter_mut().enumerate() {
            let seen = (visible >> (n * LANES)) as __mmask16;
            let p = exp2(_mm512_fmadd_ps(*vector, scale, minus_base));
            *vector = _mm512_maskz_mov_ps(seen, p);
            sum = _mm512_add_ps(sum, *vector);
        }
        let [a, b, c, d] = vectors;
        store_512(probabilities, round_two(a, b));
        store_512(&mut probabilities[2 * LANES..], round_two(c, d));
        let rescale = exp2(_mm512_set1_ps(old - base));
        self.maximum[row] = new;
        let sums = &mut self.sums[row * LANES..][..LANES];
        let total = _mm512_fmadd_ps(load(sums), rescale, sum);
        store_512(sums, _mm512_castps_si512(total));
        let stride = self.output.len() / ROWS;
        for output in self.output[row * stride..][..stride].chunks_exact_mut(LANES) {
            let scaled = _mm512_mul_ps(load(output), rescale);
            store_512(output, _mm512_castps_si512(scaled));
        }
    }

    /// Writes the output `[D]` of `row`; returns the logarithm of its sum of exponentials.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) fn finish(&self, row: usize, o: &mut [bf16]) -> f32 {
        let sum = _mm512_reduce_add_ps(load(&self.sums[row * LANES..]));
        let stride = self.output.len() / ROWS;
        let output = self.output[row * stride..].chunks_exact(LANES);
        for (o, output) in o.chunks_mut(LANES).zip(output) {
            // Plus zero: how many zeros were added to a zero, and with them its sign, depends on the other rows.
            let value = _mm512_add_ps(_mm512_div_ps(load(output), _mm512_set1_ps(sum)), _mm512_setzero_ps());
            store_rounded(o, value);
        }
        self.maximum[row] * LN_2 + ln::<true>(sum)
    }
}

/// Attention of all blocks; writes `o [T, H D]` and `lse [T, H]`.
pub(in super::super) fn forward(qkv: &[bf16], blocks: &[Block], spec: &AttentionSpec, o: &mut [bf16], lse: &mut [f32]) {
    let (heads, kv_heads, head_dim, len) = (spec.heads, spec.kv_heads, spec.head_dim, block_len(spec));
    let head = |block: &Block, number: usize| {
        let source = &qkv[block.start() * spec.qkv_width()..][..block.rows * spec.qkv_width()];
        Head { source, width: spec.qkv_width(), column: number * head_dim, head_dim }
    };
    let (mut keys, mut values) = (Room::new(blocks.len() * kv_heads * len), Room::new(blocks.len() * kv_heads * len));
    keys.par_chunks_mut(len).zip(values.par_chunks_mut(len)).enumerate().for_each(|(n, (keys, values))| {
        let (block, kv_head) = (&blocks[n / kv_heads], n % kv_heads);
        // SAFETY: this path is taken only where the processor has tiles and their AVX-512.
        unsafe {
            pack_transposed(head(block, heads + kv_head), keys);
            pack_pairs(head(block, heads + kv_heads + kv_head), values);
        }
    });
    let (o, lse) = (Shared::new(o), Shared::new(lse));
    (0..blocks.len() * heads).into_par_iter().for_each_init(
        || (Room::new(len), Running::<32>::new(spec)),
        |(q, running), n| {
            let (block, number) = (&blocks[n / heads], n % heads);
            let packed = |n: usize| {
                let start = ((block.first + n) * kv_heads + number / spec.group()) * len;
                (&keys[start..start + len], &values[start..start + len])
            };
            // SAFETY: as above.
            unsafe { pack_rows(head(block, number), q) };
            for first in (0..block.rows).step_by(32) {
                let rows = (block.rows - first).min(32);
                let q = &q[first * len / BLOCK_KEYS..][..32 * len / BLOCK_KEYS];
                // SAFETY: as above.
                unsafe { attend_rows(q, block, first, rows, packed, spec, running) };
                for row in 0..rows {
                    let token = block.start() + first + row;
                    // SAFETY: no other task has this token and head; the path as above.
                    unsafe {
                        let o = o.part(token * spec.output_width() + number * head_dim, head_dim);
                        lse.part(token * heads + number, 1)[0] = running.finish(row, o);
                    }
                }
            }
        },
    );
}

/// Attends `rows` (at most 32) rows of a block, from its row `first` on, to all keys that they see.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn attend_rows<'a>(
    q: &[bf16],
    block: &Block,
    first: usize,
    rows: usize,
    packed: impl Fn(usize) -> (&'a [bf16], &'a [bf16]),
    spec: &AttentionSpec,
    running: &mut Running<32>,
) {
    let Some(tiles) = Tiles::new() else { unreachable!("the path of tiles without tiles") };
    let visible = |row: usize| spec.visible(block.position + first + row, block.len);
    let (from, to) = (visible(0).0, visible(rows - 1).1);
    running.start();
    for n in from / BLOCK_KEYS..to.div_ceil(BLOCK_KEYS) {
        let masks = array::from_fn(|row| {
            if row >= rows {
                return 0;
            }
            let (start, end) = visible(row);
            let (from, to) = block_range(start, end, n * BLOCK_KEYS);
            range_mask(from, to)
        });
        let (keys, values) = packed(n);
        running.attend(&tiles, q, keys, values, &masks, spec.scale);
    }
}
