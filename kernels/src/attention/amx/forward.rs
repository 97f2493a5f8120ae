//! The forward on tiles: 32 query rows at a time against blocks of keys, with a running softmax.

use std::arch::x86_64::*;
use std::array;
use std::f32::consts::{LN_2, LOG2_E};
use std::mem::MaybeUninit;
use std::ops::Range;

use half::bf16;

use super::super::blocks::Block;
use super::super::forward::block_range;
use super::super::layout::padded_pairs;
use super::super::tasks::{self, Ahead, Task, key_blocks};
use super::product::{COLUMNS, Left, Pairs, STEP, product};
use super::vector::{exp2, load, maxima, pack_pairs, pack_rows, pack_transposed};
use super::vector::{range_mask, round_two, store_512, store_rounded};
use super::{AttentionSpec, BLOCK_KEYS, Head, Room, block_len, part};
use crate::amx::Tiles;
use crate::gemm::Output;
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
    fn softmax_all(&mut self, visible: &[u64; ROWS], halves: Range<usize>, scale: f32, ahead: &mut Ahead) {
        let (from, scale) = (halves.start * 2, scale * LOG2_E);
        for first in (0..ROWS).step_by(LANES) {
            let all = visible[first..first + LANES].iter().fold(u64::MAX, |all, row| all & row) == u64::MAX;
            match (halves.len(), all) {
                (1, _) => self.softmax_rows::<2, false>(first, visible, from, scale, ahead),
                (_, false) => self.softmax_rows::<4, false>(first, visible, from, scale, ahead),
                (_, true) => self.softmax_rows::<4, true>(first, visible, from, scale, ahead),
            }
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
    /// Only the `VECTORS` of 16 keys from vector `from` on are seen by any row, `ALL` of them if so, and only they are
    /// written. What is done to a row does not depend on the others.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn softmax_rows<const VECTORS: usize, const ALL: bool>(
        &mut self,
        first: usize,
        visible: &[u64; ROWS],
        from: usize,
        scale: f32,
        ahead: &mut Ahead,
    ) {
        let (at, len) = (first * BLOCK_KEYS + from * LANES, (LANES - 1) * BLOCK_KEYS + VECTORS * LANES);
        let (scores, probabilities) = (&self.scores[at..][..len], &mut self.probabilities[at..][..len]);
        let scores = |row: usize, n: usize| load(&scores[row * BLOCK_KEYS + n * LANES..]);
        let seen = |row: usize, n: usize| (visible[first + row] >> ((from + n) * LANES)) as __mmask16;
        let hidden = _mm512_set1_ps(f32::NEG_INFINITY);
        let mut largest = [hidden; LANES];
        for (row, largest) in largest.iter_mut().enumerate() {
            for n in 0..VECTORS {
                let score = if ALL { scores(row, n) } else { _mm512_mask_mov_ps(hidden, seen(row, n), scores(row, n)) };
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
            let mut p = [_mm512_setzero_ps(); VECTORS];
            for n in 0..VECTORS {
                p[n] = exp2(_mm512_fmadd_ps(scores(row, n), scale, minus_base));
                if !ALL {
                    p[n] = _mm512_maskz_mov_ps(seen(row, n), p[n]);
                }
                sum = _mm512_add_ps(sum, p[n]);
            }
            for n in (0..VECTORS).step_by(2) {
                store_512(&mut probabilities[row * BLOCK_KEYS + n * LANES..], round_two(p[n], p[n + 1]));
            }
            ahead.step();
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
        // SAFETY: what is initialised stays so.
        self.finish_to(row, unsafe { &mut *(std::ptr::from_mut(o) as *mut [MaybeUninit<bf16>]) })
    }

    /// [`Running::finish`] of an output that need not be initialised.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn finish_to(&self, row: usize, o: &mut [MaybeUninit<bf16>]) -> f32 {
        let sum = _mm512_reduce_add_ps(load(&self.sums[row * LANES..]));
        let stride = self.output.len() / ROWS;
        let output = self.output[row * stride..].chunks_exact(2 * LANES);
        for (o, output) in o.chunks_mut(2 * LANES).zip(output) {
            let mut values = [_mm512_setzero_ps(); 2];
            for (value, output) in values.iter_mut().zip(output.chunks_exact(LANES)) {
                // Plus zero: how many zeros were added to a zero, and with them its sign, depends on the other rows.
                *value = _mm512_add_ps(_mm512_div_ps(load(output), _mm512_set1_ps(sum)), _mm512_setzero_ps());
            }
            store_rounded(o, values);
        }
        sum
    }
}

/// The halves of a block, of 32 keys, in which any row sees a key.
fn halves(visible: &[u64]) -> Range<usize> {
    let seen = visible.iter().fold(0, |seen, row| seen | row);
    if seen == 0 { 0..0 } else { usize::from(seen as u32 == 0)..1 + usize::from(seen >> 32 != 0) }
}

/// What a task works in.
struct Scratch {
    /// Keys and values of one head, `[blocks, 64 · D padded]`.
    keys: Room<bf16>,
    values: Room<bf16>,
    /// Queries of a block.
    q: Room<bf16>,
    running: [Running<32>; BLOCK_KEYS / 32],
}

/// Attention of all blocks; writes `o [T, H D]` and `lse [T, H]`.
pub(in super::super) fn forward(
    qkv: &[bf16],
    blocks: &[Block],
    spec: &AttentionSpec,
    o: Output<'_, bf16>,
    lse: Output<'_, f32>,
) {
    let len = block_len(spec);
    let row_bytes = 2 * (spec.group() + 1) * spec.head_dim * size_of::<bf16>();
    let tasks = tasks::cut(blocks, spec, row_bytes, true);
    let longest = tasks.iter().map(|task| task.keys.len()).max().unwrap_or(0);
    let scratch = || Scratch {
        keys: Room::new(longest * len),
        values: Room::new(longest * len),
        q: Room::new(len),
        running: [(); BLOCK_KEYS / 32].map(|()| Running::new(spec)),
    };
    let lines = |task: &Task| {
        let mut lines = vec![task.query_lines(qkv.as_ptr(), spec.qkv_width(), spec.head_dim, spec)];
        lines.extend(task.key_lines(qkv.as_ptr(), spec));
        lines.push(task.query_lines(o.start(), spec.output_width(), spec.head_dim, spec).writing());
        lines.push(task.query_lines(lse.start(), spec.heads, 1, spec).writing());
        lines
    };
    let steps = |task: &Task| task.pairs(spec) * BLOCK_KEYS;
    tasks::run(&tasks, scratch, lines, steps, |task, scratch, ahead| {
        // SAFETY: this path is taken only where the processor has tiles and their AVX-512.
        unsafe { attend_heads(task, qkv, spec, scratch, &o, &lse, ahead) };
    });
}

/// Attention of a task's heads.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn attend_heads(
    task: &Task,
    qkv: &[bf16],
    spec: &AttentionSpec,
    scratch: &mut Scratch,
    o: &Output<'_, bf16>,
    lse: &Output<'_, f32>,
    ahead: &mut Ahead,
) {
    let Some(tiles) = Tiles::new() else { unreachable!("the path of tiles without tiles") };
    let (heads, kv_heads, len) = (spec.heads, spec.kv_heads, block_len(spec));
    let head = |block: &Block, number: usize| Head::of(qkv, spec.qkv_width(), block, number, spec);
    let Scratch { keys, values, q, running } = scratch;
    for kv_head in task.kv_heads.clone() {
        let packed = keys.chunks_exact_mut(len).zip(values.chunks_exact_mut(len));
        for (block, (keys, values)) in task.sequence[task.keys.clone()].iter().zip(packed) {
            pack_transposed(head(block, heads + kv_head), keys);
            pack_pairs(head(block, heads + kv_heads + kv_head), values);
        }
        let (keys, values) = (&**keys, &**values);
        let packed = |n: usize| {
            let at = (n - task.keys.start) * len..(n - task.keys.start + 1) * len;
            (&keys[at.clone()], &values[at])
        };
        for number in kv_head * spec.group()..(kv_head + 1) * spec.group() {
            for block in &task.sequence[task.queries.clone()] {
                let source = head(block, number);
                let q = if source.lies_in_tiles() {
                    Left { values: &source.source[source.column..], stride: source.width }
                } else {
                    pack_rows(source, q);
                    Left { values: q, stride: len / BLOCK_KEYS }
                };
                let running = &mut running[..block.rows.div_ceil(32)];
                attend_rows(&tiles, q, block, packed, spec, running, ahead);
                for (part, running) in running.iter().enumerate() {
                    let rows = (block.rows - 32 * part).min(32);
                    write(running, block.start() + 32 * part, rows, number, spec, o, lse);
                }
            }
        }
    }
}

/// Writes the output of head `number` of the `rows` rows from `token` on, and the logarithms of their sums.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn write(
    running: &Running<32>,
    token: usize,
    rows: usize,
    number: usize,
    spec: &AttentionSpec,
    o: &Output<'_, bf16>,
    lse: &Output<'_, f32>,
) {
    let mut sums = [1.0; 32];
    for (row, sum) in sums.iter_mut().enumerate().take(rows) {
        let start = (token + row) * spec.output_width() + number * spec.head_dim;
        // SAFETY: no other task has this token and head.
        *sum = running.finish_to(row, unsafe { part(o, start, spec.head_dim) });
    }
    for (row, value) in running.logarithms(sums).into_iter().enumerate().take(rows) {
        // SAFETY: as above.
        let lse = unsafe { part(lse, (token + row) * spec.heads + number, 1) };
        lse[0].write(value);
    }
}

/// Attends the rows of a block, 32 in each of `running`, to all keys that they see.
///
/// Both halves take each stage one after the other: tiles cannot load what has just been stored without waiting for it.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn attend_rows<'a>(
    tiles: &Tiles,
    q: Left,
    block: &Block,
    packed: impl Fn(usize) -> (&'a [bf16], &'a [bf16]),
    spec: &AttentionSpec,
    running: &mut [Running<32>],
    ahead: &mut Ahead,
) {
    let visible = |row: usize| spec.visible(block.position + row, block.len);
    running.iter_mut().for_each(Running::start);
    let mut masks = [[0; 32]; BLOCK_KEYS / 32];
    for n in key_blocks(block, spec) {
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
            running.score(tiles, q, keys, halves(masks));
        }
        for (running, masks) in running.iter_mut().zip(&masks).filter(|(_, masks)| !halves(*masks).is_empty()) {
            running.softmax_all(masks, halves(masks), spec.scale, ahead);
        }
        for (running, masks) in running.iter_mut().zip(&masks).filter(|(_, masks)| !halves(*masks).is_empty()) {
            running.add_values(tiles, values, halves(masks));
        }
    }
}
