//! The forward on tiles: 32 query rows at a time against blocks of keys, with a running softmax.

use std::arch::x86_64::*;
use std::array;
use std::f32::consts::{LN_2, LOG2_E};
use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use super::super::blocks::Block;
use super::super::forward::block_range;
use super::super::layout::padded_pairs;
use super::product::{COLUMNS, Left, Pairs, STEP, product};
use super::vector::{exp2, load, maxima, pack_pairs, pack_rows, pack_transposed, prefetch};
use super::vector::{range_mask, round_two, store_512, store_rounded};
use super::{AttentionSpec, BLOCK_KEYS, Head, Room, Shared, block_len};
use crate::amx::Tiles;
use crate::math::{LANES, ln};

/// Running softmax of `ROWS` (16 or 32) query rows; exponentials are powers of two.
pub(super) struct Running<const ROWS: usize> {
    /// Largest score so far, per row, in powers of two.
    pub(super) maximum: [f32; ROWS],
    /// Sum of `2^(score - maximum)` by lanes, `[ROWS, 16]`.
    pub(super) sums: Room<f32>,
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

    /// The scores of the rows `q`, of D padded terms, and of the keys of some halves of a block.
    #[inline]
    pub(super) fn score(&mut self, tiles: &Tiles, q: Left, keys: &[bf16], halves: Range<usize>) {
        let steps = self.output.len() / ROWS / STEP;
        for half in halves {
            let keys = Pairs { values: &keys[half * COLUMNS * 2..], stride: BLOCK_KEYS };
            product::<ROWS>(tiles, q, keys, steps, &mut self.scores[half * COLUMNS..], BLOCK_KEYS, false);
        }
    }

    /// Turns the scores of some halves of a block, of which row `r` sees the bits of `visible[r]`, into probabilities; updates
    /// maxima, sums and the scale of the output.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn softmax_all(&mut self, visible: &[u64; ROWS], halves: Range<usize>, scale: f32) {
        for first in (0..ROWS).step_by(LANES) {
            self.softmax_rows(first, visible, halves.start * 2..halves.end * 2, scale * LOG2_E);
        }
    }

    /// Adds the values of some halves of a block times their probabilities.
    #[inline]
    pub(super) fn add_values(&mut self, tiles: &Tiles, values: &[bf16], halves: Range<usize>) {
        let stride = self.output.len() / ROWS;
        let probabilities = Left { values: &self.probabilities[halves.start * STEP..], stride: BLOCK_KEYS };
        for column in (0..stride).step_by(COLUMNS) {
            let values = Pairs { values: &values[(halves.start * STEP / 2 * stride + column) * 2..], stride };
            product::<ROWS>(tiles, probabilities, values, halves.len(), &mut self.output[column..], stride, true);
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

    /// Turns scores of 16 rows into `2^(scale · score - maximum)`, hidden keys into 0, rounded; updates maxima and sums.
    ///
    /// Only the `vectors` of 16 keys are seen by any row, and only they are written. What is done to a row does not
    /// depend on the others.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn softmax_rows(&mut self, first: usize, visible: &[u64; ROWS], vectors: Range<usize>, scale: f32) {
        let all = visible[first..first + LANES].iter().fold(u64::MAX, |all, row| all & row) == u64::MAX;
        let scores = |row: usize, n: usize| load(&self.scores[(first + row) * BLOCK_KEYS + n * LANES..]);
        let seen = |row: usize, n: usize| (visible[first + row] >> (n * LANES)) as __mmask16;
        let hidden = _mm512_set1_ps(f32::NEG_INFINITY);
        let mut largest = [hidden; LANES];
        for (row, largest) in largest.iter_mut().enumerate() {
            for n in vectors.clone() {
                let score = if all { scores(row, n) } else { _mm512_mask_mov_ps(hidden, seen(row, n), scores(row, n)) };
                *largest = _mm512_max_ps(*largest, score);
            }
        }
        let largest = _mm512_mul_ps(maxima(largest), _mm512_set1_ps(scale));
        let old = load(&self.maximum[first..]);
        let new = _mm512_mask_mov_ps(old, _mm512_cmp_ps_mask::<_CMP_GT_OQ>(largest, old), largest);
        // All scores -inf: any finite number will do.
        let base = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(new, hidden), new);
        let rescale = exp2(_mm512_sub_ps(old, base));
        // No output yet, or the same maximum.
        let same = _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(rescale, _mm512_set1_ps(1.0));
        let rescales_output = same | _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(old, hidden) != u16::MAX;
        let mut rows = [[0f32; LANES]; 2];
        store_512(&mut rows[0], _mm512_castps_si512(_mm512_sub_ps(_mm512_set1_ps(-0.0), base)));
        store_512(&mut rows[1], _mm512_castps_si512(rescale));
        store_512(&mut self.maximum[first..], _mm512_castps_si512(new));
        let scale = _mm512_set1_ps(scale);
        let stride = self.output.len() / ROWS;
        for row in 0..LANES {
            let (minus_base, rescale) = (_mm512_set1_ps(rows[0][row]), _mm512_set1_ps(rows[1][row]));
            let mut sum = _mm512_setzero_ps();
            for n in vectors.clone().step_by(2) {
                let mut p = [_mm512_setzero_ps(); 2];
                for (n, p) in (n..).zip(&mut p) {
                    *p = exp2(_mm512_fmadd_ps(
                        load(&self.scores[(first + row) * BLOCK_KEYS + n * LANES..]),
                        scale,
                        minus_base,
                    ));
                    if !all {
                        *p = _mm512_maskz_mov_ps((visible[first + row] >> (n * LANES)) as __mmask16, *p);
                    }
                    sum = _mm512_add_ps(sum, *p);
                }
                let at = (first + row) * BLOCK_KEYS + n * LANES;
                store_512(&mut self.probabilities[at..], round_two(p[0], p[1]));
            }
            let sums = &mut self.sums[(first + row) * LANES..][..LANES];
            let total = _mm512_fmadd_ps(load(sums), rescale, sum);
            store_512(sums, _mm512_castps_si512(total));
            if rescales_output {
                for output in self.output[(first + row) * stride..][..stride].chunks_exact_mut(LANES) {
                    let scaled = _mm512_mul_ps(load(output), rescale);
                    store_512(output, _mm512_castps_si512(scaled));
                }
            }
        }
    }

    /// Logarithms of the sums of exponentials of rows whose sums are these.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn logarithms(&self, sums: [f32; ROWS]) -> [f32; ROWS] {
        array::from_fn(|row| self.maximum[row] * LN_2 + ln::<true>(sums[row]))
    }

    /// Writes the output `[D]` of `row`; returns its sum of exponentials.
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
        sum
    }
}

/// The halves of a block, of 32 keys, in which any row sees a key.
fn halves(visible: &[u64]) -> Range<usize> {
    let seen = visible.iter().fold(0, |seen, row| seen | row);
    if seen == 0 { 0..0 } else { usize::from(seen as u32 == 0)..1 + usize::from(seen >> 32 != 0) }
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
        if let Some(next) = blocks.get((n + 1) / kv_heads) {
            prefetch(head(next, heads + (n + 1) % kv_heads));
            prefetch(head(next, heads + kv_heads + (n + 1) % kv_heads));
        }
        // SAFETY: this path is taken only where the processor has tiles and their AVX-512.
        unsafe {
            pack_transposed(head(block, heads + kv_head), keys);
            pack_pairs(head(block, heads + kv_heads + kv_head), values);
        }
    });
    let (o, lse) = (Shared::new(o), Shared::new(lse));
    (0..blocks.len() * heads).into_par_iter().for_each_init(
        || (Room::new(len), [(); BLOCK_KEYS / 32].map(|()| Running::<32>::new(spec))),
        |(q, running), n| {
            let (block, number) = (&blocks[n / heads], n % heads);
            let packed = |n: usize| {
                let start = ((block.first + n) * kv_heads + number / spec.group()) * len;
                (&keys[start..start + len], &values[start..start + len])
            };
            let source = head(block, number);
            if let Some(next) = blocks.get((n + 1) / heads) {
                prefetch(head(next, (n + 1) % heads));
            }
            let width = spec.output_width();
            o.prefetch(block.start() * width + number * head_dim, (block.rows, head_dim), width);
            let q = if source.lies_in_tiles() {
                Left { values: &source.source[source.column..], stride: source.width }
            } else {
                // SAFETY: as above.
                unsafe { pack_rows(source, q) };
                Left { values: q, stride: len / BLOCK_KEYS }
            };
            let running = &mut running[..block.rows.div_ceil(32)];
            // SAFETY: as above.
            unsafe { attend_rows(q, block, packed, spec, running) };
            for (part, running) in running.iter().enumerate() {
                let token = |row: usize| block.start() + 32 * part + row;
                let rows = (block.rows - 32 * part).min(32);
                let mut sums = [1.0; 32];
                for (row, sum) in sums.iter_mut().enumerate().take(rows) {
                    // SAFETY: no other task has this token and head; the path as above.
                    unsafe {
                        let o = o.part(token(row) * width + number * head_dim, head_dim);
                        *sum = running.finish(row, o);
                    }
                }
                // SAFETY: as above.
                let logarithms = unsafe { running.logarithms(sums) };
                for (row, value) in logarithms.into_iter().enumerate().take(rows) {
                    // SAFETY: as above.
                    unsafe { lse.part(token(row) * heads + number, 1)[0] = value };
                }
            }
        },
    );
}

/// Attends the rows of a block, 32 in each of `running`, to all keys that they see.
///
/// Both halves take each stage one after the other: tiles cannot load what has just been stored without waiting for it.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn attend_rows<'a>(
    q: Left,
    block: &Block,
    packed: impl Fn(usize) -> (&'a [bf16], &'a [bf16]),
    spec: &AttentionSpec,
    running: &mut [Running<32>],
) {
    let Some(tiles) = Tiles::new() else { unreachable!("the path of tiles without tiles") };
    let visible = |row: usize| spec.visible(block.position + row, block.len);
    let (from, to) = (visible(0).0, visible(block.rows - 1).1);
    running.iter_mut().for_each(Running::start);
    let mut masks = [[0; 32]; BLOCK_KEYS / 32];
    for n in from / BLOCK_KEYS..to.div_ceil(BLOCK_KEYS) {
        let sees_all = visible(block.rows - 1).0 <= n * BLOCK_KEYS && visible(0).1 >= (n + 1) * BLOCK_KEYS;
        for (row, mask) in masks.as_flattened_mut().iter_mut().enumerate() {
            *mask = if row >= block.rows {
                0
            } else if sees_all {
                u64::MAX
            } else {
                let (start, end) = visible(row);
                let (from, to) = block_range(start, end, n * BLOCK_KEYS);
                range_mask(from, to)
            };
        }
        let (keys, values) = packed(n);
        for (part, (running, masks)) in running.iter_mut().zip(&masks).enumerate() {
            let q = Left { values: &q.values[32 * part * q.stride..], stride: q.stride };
            running.score(&tiles, q, keys, halves(masks));
        }
        for (running, masks) in running.iter_mut().zip(&masks).filter(|(_, masks)| !halves(*masks).is_empty()) {
            running.softmax_all(masks, halves(masks), spec.scale);
        }
        for (running, masks) in running.iter_mut().zip(&masks).filter(|(_, masks)| !halves(*masks).is_empty()) {
            running.add_values(&tiles, values, halves(masks));
        }
    }
}
