//! The forward for a few query rows, as in decoding: keys lie in the lanes, one row of scores at a time.

use std::ops::Range;

use super::blocks::padded;
use super::forward::block_range;
use super::tile::{Right, TILE_ROWS, product};
use super::{AttentionSpec, BLOCK_KEYS};
use crate::element::Element;
use crate::math::{LANES, exp, larger, ln, max_lanes, sum_lanes};
use crate::simd::{fma, simd_fn};

/// One query row of one head, and the keys it sees.
#[derive(Clone, Copy, Debug)]
pub(super) struct Query<'a> {
    /// Its coordinates, `[D]`.
    pub(super) q: &'a [f32],
    /// First visible key.
    pub(super) start: usize,
    /// One past the last visible key.
    pub(super) end: usize,
}

/// Running softmax of a block of query rows; holds the result once all key blocks are through.
#[derive(Debug)]
pub(super) struct Running {
    /// Largest score so far, per row.
    maximum: Vec<f32>,
    /// Sum of `exp(score - maximum)`, per row.
    sum: Vec<f32>,
    /// Unnormalised output, `[rows, D padded]`.
    output: Vec<f32>,
}

impl Running {
    /// Room for up to `rows` query rows at once.
    pub(super) fn new(rows: usize, spec: &AttentionSpec) -> Self {
        let output = vec![0.0; rows * padded(spec.head_dim)];
        Self { maximum: vec![0.0; rows], sum: vec![0.0; rows], output }
    }

    /// Forgets everything.
    pub(super) fn start(&mut self) {
        self.maximum.fill(f32::NEG_INFINITY);
        self.sum.fill(0.0);
        self.output.fill(0.0);
    }

    /// Attends the `queries` to block `n` of the sequence: its keys transposed `[D, 64]`, its values `[64, D padded]`.
    pub(super) fn attend(&mut self, queries: &[Query], n: usize, keys: &[f32], values: &[f32], scale: f32) {
        attend_block(queries, n * BLOCK_KEYS, keys, values, scale, self);
    }

    /// Writes the output `[D]` of query `row`; returns the logarithm of its sum of exponentials.
    pub(super) fn finish<E: Element>(&self, row: usize, o: &mut [E]) -> f32 {
        let stride = padded(o.len());
        normalise(&self.output[row * stride..], self.maximum[row], self.sum[row], o)
    }
}

simd_fn! {
    fn normalise<E: Element>(output: &[f32], maximum: f32, sum: f32, o: &mut [E]) -> f32 = normalise_body;
}

#[inline(always)]
fn normalise_body<E: Element, const FMA: bool>(output: &[f32], maximum: f32, sum: f32, o: &mut [E]) -> f32 {
    for (o, value) in o.iter_mut().zip(output) {
        *o = E::narrow(value / sum);
    }
    maximum + ln::<FMA>(sum)
}

/// Adds one block of keys, the first of them key number `start`, to the running softmax of `queries`.
fn attend_block(queries: &[Query], start: usize, keys: &[f32], values: &[f32], scale: f32, running: &mut Running) {
    let (tiles, rest) = queries.as_chunks::<TILE_ROWS>();
    let mut row = 0;
    for tile in tiles {
        attend_rows(*tile, row, start, keys, values, scale, running);
        row += TILE_ROWS;
    }
    for query in rest {
        attend_rows([*query], row, start, keys, values, scale, running);
        row += 1;
    }
}

/// [`attend_block`] for `R` (1 or 4) queries, from `row` on.
fn attend_rows<const R: usize>(
    queries: [Query; R],
    row: usize,
    start: usize,
    keys: &[f32],
    values: &[f32],
    scale: f32,
    running: &mut Running,
) {
    let visible = queries.map(|query| block_range(query.start, query.end, start));
    let Some(keys_seen) = union(&visible) else { return };
    let head_dim = queries[0].q.len();
    let stride = padded(head_dim);
    let columns = whole_vectors(&keys_seen);
    let mut scores = [[0.0; BLOCK_KEYS]; R];
    let keys = Right { values: keys, stride: BLOCK_KEYS };
    let flat = scores.as_flattened_mut();
    product(queries.map(|query| query.q), keys, 0..head_dim, flat, BLOCK_KEYS, columns.clone(), false);
    let output = &mut running.output[row * stride..][..R * stride];
    for r in 0..R {
        let (maximum, sum) = (&mut running.maximum[row + r], &mut running.sum[row + r]);
        let rescale = probabilities(&mut scores[r], columns.clone(), visible[r], scale, maximum, sum);
        for value in &mut output[r * stride..][..stride] {
            *value *= rescale;
        }
    }
    let values = Right { values, stride };
    product(scores.each_ref().map(|row| &row[..]), values, keys_seen, output, stride, 0..stride, true);
}

/// The smallest range that holds all of `ranges`, or `None` if they are all empty.
fn union(ranges: &[(usize, usize)]) -> Option<Range<usize>> {
    let some = ranges.iter().filter(|range| range.0 < range.1);
    some.map(|range| range.0..range.1).reduce(|a, b| a.start.min(b.start)..a.end.max(b.end))
}

/// `keys` widened to whole vectors.
fn whole_vectors(keys: &Range<usize>) -> Range<usize> {
    keys.start / LANES * LANES..keys.end.next_multiple_of(LANES)
}

simd_fn! {
    /// Turns the `columns` of a row of scores into `exp(scale · score - maximum)`, hidden keys into 0, and updates maximum
    /// and sum; `columns` are whole vectors that hold all of the visible keys `from..to`.
    ///
    /// Returns the factor that brings what was accumulated before to the new maximum.
    fn probabilities(
        scores: &mut [f32; BLOCK_KEYS], columns: Range<usize>, visible: (usize, usize), scale: f32, maximum: &mut f32,
        sum: &mut f32,
    ) -> f32 = probabilities_body;
}

#[inline(always)]
fn probabilities_body<const FMA: bool>(
    scores: &mut [f32; BLOCK_KEYS],
    columns: Range<usize>,
    (from, to): (usize, usize),
    scale: f32,
    maximum: &mut f32,
    sum: &mut f32,
) -> f32 {
    if from >= to {
        scores.fill(0.0);
        return 1.0;
    }
    scores[..from].fill(f32::NEG_INFINITY);
    scores[to..].fill(f32::NEG_INFINITY);
    let (vectors, _) = scores[columns].as_chunks_mut::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for vector in vectors.iter_mut() {
        for lane in 0..LANES {
            vector[lane] *= scale;
            lanes[lane] = larger(lanes[lane], vector[lane]);
        }
    }
    let old = *maximum;
    let new = larger(old, max_lanes(lanes));
    let mut sums = [0.0; LANES];
    for vector in vectors {
        for lane in 0..LANES {
            vector[lane] = exp::<FMA>(vector[lane] - new);
            sums[lane] += vector[lane];
        }
    }
    // No branch on whether the maximum grew, which no processor predicts: e^0 is 1, and e^-inf for the first block 0.
    let rescale = exp::<FMA>(old - new);
    *maximum = new;
    *sum = fma::<FMA>(*sum, rescale, sum_lanes(sums));
    rescale
}
