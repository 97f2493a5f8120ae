//! How keys and values are stored per block of 64: f32 as the register tiles read them, bf16 as the matrix tiles do.

use half::bf16;

use super::BLOCK_KEYS;
use super::blocks::{copy_head, padded, transpose_head};
use crate::element::Element;
use crate::math::LANES;
use crate::prefetch::{LINE, prefetch, prefetch_line};

/// Keys that a step of a product over keys takes, and that a block is read by.
pub(super) const HALF_KEYS: usize = BLOCK_KEYS / 2;

/// Bf16 head width rounded up to whole pairs of matrix tiles.
pub(super) fn padded_pairs(head_dim: usize) -> usize {
    head_dim.next_multiple_of(2 * LANES)
}

/// An element type with a layout for blocks of keys and values.
pub(super) trait Stored: Element {
    /// Elements of the keys and of the values of one block of one head.
    fn head_lens(head_dim: usize) -> (usize, usize);

    /// Stores the key head of `head_dim` columns at `column` of each of `source`'s rows (of `width`), from key `offset` on.
    fn store_keys(source: &[Self], width: usize, column: usize, head_dim: usize, offset: usize, block: &mut [Self]);

    /// As [`Stored::store_keys`] for a value head. Rows that begin a half of the block, or come before it, are followed by
    /// what [`Stored::clear_values`] leaves.
    fn store_values(source: &[Self], width: usize, column: usize, head_dim: usize, offset: usize, block: &mut [Self]);

    /// Makes the values of key `offset` and of those after it in its half of the block finite: a kernel that multiplies
    /// them by zero then adds nothing.
    fn clear_values(head_dim: usize, offset: usize, block: &mut [Self]);

    /// Asks for the places of key `offset` in its block and of its value.
    fn prefetch_key(keys: &[Self], values: &[Self], offset: usize) {
        for row in keys.chunks(4 * BLOCK_KEYS / size_of::<Self>()) {
            prefetch_line(&raw const row[offset * row.len() / BLOCK_KEYS]);
        }
        // The value, and its other half where two keys share a row.
        let keys_of_row = if size_of::<Self>() == 4 { 1 } else { 2 };
        let row = keys_of_row * values.len() / BLOCK_KEYS;
        prefetch(&values[offset / keys_of_row * row..][..row]);
    }

    /// A block of keys as f32 `[D, 64]` and one of values as f32 `[64, D padded]`, in `scratch` unless they lie there.
    fn widen<'a>(
        keys: &'a [Self],
        values: &'a [Self],
        head_dim: usize,
        scratch: &'a mut Scratch,
    ) -> (&'a [f32], &'a [f32]);
}

/// Room for a widened block.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// Keys `[D, 64]`, values `[64, D padded to 16]`.
impl Stored for f32 {
    fn head_lens(head_dim: usize) -> (usize, usize) {
        (head_dim * BLOCK_KEYS, padded(head_dim) * BLOCK_KEYS)
    }

    fn store_keys(source: &[f32], width: usize, column: usize, _: usize, offset: usize, block: &mut [f32]) {
        transpose_head(source, width, column, offset, block);
    }

    fn store_values(source: &[f32], width: usize, column: usize, head_dim: usize, offset: usize, block: &mut [f32]) {
        copy_head(source, width, column, head_dim, offset, block);
    }

    /// Hidden keys are not read.
    fn clear_values(_: usize, _: usize, _: &mut [f32]) {}

    fn widen<'a>(keys: &'a [f32], values: &'a [f32], _: usize, _: &'a mut Scratch) -> (&'a [f32], &'a [f32]) {
        (keys, values)
    }
}

/// Keys `[D padded to 32 / 2, 64, 2]`, values `[32, D padded to 32, 2]`: right matrices of tiles, whose rows are pairs.
impl Stored for bf16 {
    fn head_lens(head_dim: usize) -> (usize, usize) {
        (padded_pairs(head_dim) * BLOCK_KEYS, padded_pairs(head_dim) * BLOCK_KEYS)
    }

    fn store_keys(source: &[bf16], width: usize, column: usize, head_dim: usize, offset: usize, block: &mut [bf16]) {
        for (row, source) in source.chunks_exact(width).enumerate() {
            let (pairs, last) = source[column..column + head_dim].as_chunks::<2>();
            let columns = block[2 * (offset + row)..].chunks_mut(2 * BLOCK_KEYS);
            for (column, pair) in columns.zip(pairs) {
                column[..2].copy_from_slice(pair);
            }
            if let [last] = last {
                block[(pairs.len() * BLOCK_KEYS + offset + row) * 2] = *last;
            }
        }
    }

    fn store_values(source: &[bf16], width: usize, column: usize, head_dim: usize, offset: usize, block: &mut [bf16]) {
        let stride = padded_pairs(head_dim);
        for (row, source) in source.chunks_exact(width).enumerate() {
            let key = offset + row;
            let pairs = block[key / 2 * stride * 2..].as_chunks_mut::<2>().0;
            for (pair, value) in pairs.iter_mut().zip(&source[column..column + head_dim]) {
                pair[key % 2] = *value;
            }
        }
        let end = offset + source.len() / width;
        if offset <= end / HALF_KEYS * HALF_KEYS {
            Self::clear_values(head_dim, end, block);
        }
    }

    fn clear_values(head_dim: usize, offset: usize, block: &mut [bf16]) {
        if offset.is_multiple_of(HALF_KEYS) {
            return;
        }
        let row = 2 * padded_pairs(head_dim);
        if !offset.is_multiple_of(2) {
            block[offset / 2 * row..][..row].as_chunks_mut::<2>().0.iter_mut().for_each(|pair| pair[1] = bf16::ZERO);
        }
        block[offset.div_ceil(2) * row..offset.next_multiple_of(HALF_KEYS) / 2 * row].fill(bf16::ZERO);
    }

    fn widen<'a>(
        keys: &'a [bf16],
        values: &'a [bf16],
        head_dim: usize,
        scratch: &'a mut Scratch,
    ) -> (&'a [f32], &'a [f32]) {
        let (keys_len, values_len) = f32::head_lens(head_dim);
        scratch.keys.resize(keys_len, 0.0);
        scratch.values.resize(values_len, 0.0);
        let rows = scratch.keys.chunks_mut(2 * BLOCK_KEYS).zip(keys.chunks_exact(2 * BLOCK_KEYS));
        for (out, pairs) in rows {
            split_pairs(pairs, out, BLOCK_KEYS);
        }
        let (stride, pair) = (padded(head_dim), 2 * padded_pairs(head_dim));
        for (out, pairs) in scratch.values.chunks_exact_mut(2 * stride).zip(values.chunks_exact(pair)) {
            split_pairs(&pairs[..2 * stride], out, stride);
        }
        (&scratch.keys, &scratch.values)
    }
}

/// Writes the first elements of `pairs` to the first row of `out`, of `width`, and the second to the second, if there.
fn split_pairs(pairs: &[bf16], out: &mut [f32], width: usize) {
    for (part, out) in out.chunks_exact_mut(width).enumerate() {
        for (out, pair) in out.iter_mut().zip(pairs.as_chunks::<2>().0) {
            *out = pair[part].wide();
        }
    }
}

/// Asks for the halves of a block of keys that hold those `from..to`.
#[inline(always)]
pub(super) fn prefetch_keys<E: Stored>(keys: &[E], (from, to): (usize, usize)) {
    let lines = HALF_KEYS / LANES;
    let (from, to) = (from / HALF_KEYS * lines, to.div_ceil(HALF_KEYS) * lines);
    if to - from == BLOCK_KEYS / LANES {
        return prefetch(keys);
    }
    // A row holds a coordinate, or a pair of them, of all 64: four bytes each.
    for row in keys.chunks(4 * BLOCK_KEYS / size_of::<E>()) {
        let start = row.as_ptr().cast::<u8>();
        (from..to).for_each(|line| prefetch_line(start.wrapping_add(line * LINE)));
    }
}

/// Asks for the halves of a block of values that hold those of the keys `from..to`.
#[inline(always)]
pub(super) fn prefetch_values<E: Stored>(values: &[E], (from, to): (usize, usize)) {
    prefetch(&values[from / HALF_KEYS * values.len() / 2..to.div_ceil(HALF_KEYS) * values.len() / 2]);
}
