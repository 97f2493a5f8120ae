//! Decoding on tiles: the query heads that share keys are rows of one tile, which has no other rows.

use std::cell::Cell;
use std::f32::consts::LOG2_E;
use std::ops::Range;

use half::bf16;

use super::super::decode::{Span, Step};
use super::super::layout::{HALF_KEYS, TILE, halves, padded_pairs};
use super::forward::Running;
use super::product::{COLUMNS, STEP};
use super::vector::{pack_some_rows, range_mask};
use super::{AttentionSpec, BLOCK_KEYS, Head, Room};
use crate::amx::Tiles;
use crate::math::LANES;
use crate::prefetch::prefetch;

/// Most query heads that are worked on at once.
const ROWS: usize = 16;
/// Keys or values of a head by which memory is asked for ahead of its use.
const AHEAD: usize = 4;

/// Up to 16 of the query heads that share a key-value head.
struct Part {
    /// `[16, D padded]`.
    q: Room<bf16>,
    /// Query heads.
    rows: usize,
    running: Running<ROWS>,
}

thread_local! {
    /// What a task works in, kept for the next one.
    static PARTS: Cell<Vec<Part>> = const { Cell::new(Vec::new()) };
}

impl Part {
    fn new(spec: &AttentionSpec) -> Self {
        Self { q: Room::new(ROWS * padded_pairs(spec.head_dim)), rows: 0, running: Running::new(spec) }
    }

    /// Forgets everything but its rows.
    fn start(&mut self, rows: usize) {
        self.rows = rows;
        let width = self.q.len() / ROWS;
        self.running.maximum[..rows].fill(f32::NEG_INFINITY);
        self.running.sums[..rows * LANES].fill(0.0);
        self.running.output[..rows * width].fill(0.0);
    }

    /// The scores of the keys of some halves of a block.
    fn score(&mut self, tiles: &Tiles, keys: &[bf16], halves: Range<usize>) {
        let width = self.q.len() / ROWS;
        for half in halves {
            let keys = keys[half * keys.len() / 2..][..keys.len() / 2].as_chunks::<{ 2 * TILE }>().0;
            tiles.zero::<0>();
            tiles.zero::<1>();
            for (step, keys) in keys.iter().enumerate() {
                multiply(tiles, &self.q[step * STEP..], width, keys);
            }
            store(tiles, &mut self.running.scores[half * COLUMNS..], BLOCK_KEYS);
        }
    }

    /// Adds the values of some halves of a block times their probabilities.
    fn add_values(&mut self, tiles: &Tiles, values: &[bf16], halves: Range<usize>) {
        let width = self.q.len() / ROWS;
        let (values, columns) = (values.as_chunks::<{ 2 * TILE }>().0, width / COLUMNS);
        for column in 0..columns {
            let output = &mut self.running.output[column * COLUMNS..];
            load(tiles, output, width);
            for half in halves.clone() {
                let probabilities = &self.running.probabilities[half * STEP..];
                multiply(tiles, probabilities, BLOCK_KEYS, &values[half * columns + column]);
            }
            store(tiles, output, width);
        }
    }
}

/// Adds to 32 columns of sums the product of a step of rows of `left`, `stride` apart, and two tiles.
#[inline(always)]
fn multiply(tiles: &Tiles, left: &[bf16], stride: usize, right: &[bf16; 2 * TILE]) {
    assert!(left.len() >= (ROWS - 1) * stride + STEP, "left matrix");
    let right = right.as_ptr().cast::<u8>();
    // SAFETY: the rows were just checked; the tiles are there.
    unsafe {
        tiles.load::<4>(left.as_ptr().cast(), 2 * stride);
        tiles.load::<6>(right, 64);
        tiles.multiply_add::<0, 4, 6>();
        tiles.load::<7>(right.add(size_of::<[bf16; TILE]>()), 64);
        tiles.multiply_add::<1, 4, 7>();
    }
}

/// Reads 32 columns of sums from rows `stride` apart.
#[inline(always)]
fn load(tiles: &Tiles, sums: &[f32], stride: usize) {
    assert!(sums.len() >= (ROWS - 1) * stride + COLUMNS, "sums");
    // SAFETY: the rows were just checked.
    unsafe {
        tiles.load::<0>(sums.as_ptr().cast(), 4 * stride);
        tiles.load::<1>(sums.as_ptr().wrapping_add(LANES).cast(), 4 * stride);
    }
}

/// Writes 32 columns of sums to rows `stride` apart.
#[inline(always)]
fn store(tiles: &Tiles, sums: &mut [f32], stride: usize) {
    assert!(sums.len() >= (ROWS - 1) * stride + COLUMNS, "sums");
    // SAFETY: the rows were just checked.
    unsafe {
        tiles.store::<0>(sums.as_mut_ptr().cast(), 4 * stride);
        tiles.store::<1>(sums.as_mut_ptr().wrapping_add(LANES).cast(), 4 * stride);
    }
}

/// Keys and values that a task reads, in the order in which it does.
fn read<'a>(step: &'a Step<'_, bf16>, spans: &'a [Span]) -> impl Iterator<Item = &'a [bf16]> {
    spans.iter().flat_map(move |Span { row, heads }| {
        step.seen(*row).flat_map(move |n| {
            let range = step.range(*row, n);
            let keys = heads.clone().map(move |head| halves(step.keys(*row, head, n), range));
            keys.chain(heads.clone().map(move |head| halves(step.values(*row, head, n), range)))
        })
    })
}

/// Asks for the first half of each page of `values`. Where what is read lies in one piece, the processor asks for the rest
/// of a page by itself, and with more than it can hold requests for, everything would wait.
#[inline(always)]
fn touch(values: &[bf16]) {
    const PAGE: usize = 4096 / size_of::<bf16>();
    for page in values.chunks(PAGE) {
        prefetch(&page[..page.len().min(PAGE / 2)]);
    }
}

/// The heads of `spans`, one after the other in `o`.
pub(in super::super) fn decode(step: &Step<'_, bf16>, spans: &[Span], o: &mut [bf16]) {
    let spec = step.spec;
    let parts_of_head = spec.group().div_ceil(ROWS);
    let mut parts = PARTS.take();
    if parts.first().is_none_or(|part| part.q.len() != ROWS * padded_pairs(spec.head_dim)) {
        parts.clear();
    }
    parts.resize_with(parts.len().max(spec.kv_heads * parts_of_head), || Part::new(spec));
    // SAFETY: this path is taken only where the processor has tiles and their AVX-512.
    unsafe { attend(step, spans, parts_of_head, &mut parts, o) }
    PARTS.set(parts);
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn attend(step: &Step<'_, bf16>, spans: &[Span], parts_of_head: usize, parts: &mut [Part], o: &mut [bf16]) {
    let (spec, head_dim, group) = (step.spec, step.spec.head_dim, step.spec.group());
    let Some(tiles) = Tiles::with_left_rows(group.min(ROWS)) else { unreachable!("the path of tiles without tiles") };
    let mut ahead = read(step, spans).skip(AHEAD);
    let mut touch_next = || ahead.next().into_iter().for_each(touch);
    let mut o = o;
    for span in spans {
        let parts = &mut parts[..span.heads.len() * parts_of_head];
        for (head, parts) in span.heads.clone().zip(parts.chunks_mut(parts_of_head)) {
            for (part, source) in parts.iter_mut().zip(step.queries(span.row, head).chunks(ROWS * head_dim)) {
                pack_some_rows(Head { source, width: head_dim, column: 0, head_dim }, &mut part.q);
                part.start(source.len() / head_dim);
            }
        }
        let seen = step.seen(span.row);
        for n in seen.clone() {
            let (from, to) = step.range(span.row, n);
            let (mask, halves) = (range_mask(from, to), from / HALF_KEYS..to.div_ceil(HALF_KEYS));
            // The new key is in the last block, whose places are on their way by then.
            if n + 1 == seen.end {
                step.store(span);
            }
            // One stage for all heads after the other: of one head, each would wait for the one before.
            for (head, parts) in span.heads.clone().zip(parts.chunks_mut(parts_of_head)) {
                touch_next();
                let keys = step.keys(span.row, head, n);
                parts.iter_mut().for_each(|part| part.score(&tiles, keys, halves.clone()));
            }
            for part in parts.iter_mut() {
                (0..part.rows).for_each(|row| part.running.softmax(row, mask, spec.scale * LOG2_E));
            }
            for (head, parts) in span.heads.clone().zip(parts.chunks_mut(parts_of_head)) {
                touch_next();
                if n + 2 == seen.end {
                    step.prefetch_place(span.row, head);
                }
                let values = step.values(span.row, head, n);
                parts.iter_mut().for_each(|part| part.add_values(&tiles, values, halves.clone()));
            }
        }
        for parts in parts.chunks_mut(parts_of_head) {
            let (heads, rest) = o.split_at_mut(group * head_dim);
            for (part, heads) in parts.iter().zip(heads.chunks_mut(ROWS * head_dim)) {
                for (row, o) in heads.chunks_exact_mut(head_dim).enumerate() {
                    part.running.finish(row, o);
                }
            }
            o = rest;
        }
    }
}
