//! How keys and values are stored per block of 64: f32 as the register tiles read them, bf16 as the matrix tiles do.

use half::bf16;

use super::BLOCK_KEYS;
use super::blocks::{copy_head, padded, transpose_head};
use crate::element::Element;
use crate::math::LANES;
use crate::prefetch::{prefetch, prefetch_line};

/// Keys that a step of a product over keys takes, and that a block is read by.
pub(super) const HALF_KEYS: usize = BLOCK_KEYS / 2;

/// Bf16 head width rounded up to whole pairs of matrix tiles.
pub(super) fn padded_pairs(head_dim: usize) -> usize {
    head_dim.next_multiple_of(2 * LANES)
}

/// The halves of a block of one head that hold the keys `from..to`, where a half lies in one piece.
#[inline(always)]
pub(super) fn halves<E>(block: &[E], (from, to): (usize, usize)) -> &[E] {
    &block[from / HALF_KEYS * block.len() / 2..to.div_ceil(HALF_KEYS) * block.len() / 2]
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

    /// Asks for the halves of a block of keys that hold those `from..to`.
    fn prefetch_keys(keys: &[Self], range: (usize, usize));

    /// Asks for the places of key `offset` in its block and of its value.
    fn prefetch_place(keys: &[Self], values: &[Self], offset: usize);

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

    #[inline(always)]
    fn prefetch_keys(keys: &[f32], (from, to): (usize, usize)) {
        let (from, to) = (from / HALF_KEYS * HALF_KEYS, to.div_ceil(HALF_KEYS) * HALF_KEYS);
        if to - from == BLOCK_KEYS {
            return prefetch(keys);
        }
        keys.chunks_exact(BLOCK_KEYS).for_each(|row| prefetch(&row[from..to]));
    }

    fn prefetch_place(keys: &[f32], values: &[f32], offset: usize) {
        keys.chunks_exact(BLOCK_KEYS).for_each(|row| prefetch_line(&raw const row[offset]));
        let width = values.len() / BLOCK_KEYS;
        prefetch(&values[offset * width..][..width]);
    }

    fn widen<'a>(keys: &'a [f32], values: &'a [f32], _: usize, _: &'a mut Scratch) -> (&'a [f32], &'a [f32]) {
        (keys, values)
    }
}

/// Elements of a matrix tile: 16 pairs of terms by 16 columns, the two terms of a pair side by side.
pub(super) const TILE: usize = 512;
/// Terms, and columns, that two neighbouring tiles hold.
const STEP: usize = 32;

/// Right matrices of tiles, the tiles in the order in which they are read, so that all that is read lies in one piece.
///
/// Keys are columns: of each half of the block, for every 32 coordinates of D padded to 32, the tiles of the first and of
/// the last 16 keys. Values are terms: of each half, for every 32 coordinates, those of the first and the last 16 of them.
impl Stored for bf16 {
    fn head_lens(head_dim: usize) -> (usize, usize) {
        (padded_pairs(head_dim) * BLOCK_KEYS, padded_pairs(head_dim) * BLOCK_KEYS)
    }

    fn store_keys(source: &[bf16], width: usize, column: usize, head_dim: usize, offset: usize, block: &mut [bf16]) {
        for (row, source) in source.chunks_exact(width).enumerate() {
            let key = offset + row;
            let half = &mut half_of(block, key)[key % STEP / LANES * TILE + key % LANES * 2..];
            let steps = half.chunks_mut(2 * TILE).zip(source[column..column + head_dim].chunks(STEP));
            for (tile, terms) in steps {
                for (line, pair) in tile.chunks_mut(STEP).zip(terms.chunks(2)) {
                    line[..pair.len()].copy_from_slice(pair);
                }
            }
        }
    }

    fn store_values(source: &[bf16], width: usize, column: usize, head_dim: usize, offset: usize, block: &mut [bf16]) {
        for (row, source) in source.chunks_exact(width).enumerate() {
            let key = offset + row;
            let tiles = half_of(block, key).chunks_exact_mut(TILE);
            for (tile, values) in tiles.zip(source[column..column + head_dim].chunks(LANES)) {
                let line = &mut tile[key % STEP / 2 * STEP..][..STEP];
                for (pair, value) in line.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                    pair[key % 2] = *value;
                }
            }
        }
        let end = offset + source.len() / width;
        if offset <= end / HALF_KEYS * HALF_KEYS {
            Self::clear_values(head_dim, end, block);
        }
    }

    fn clear_values(_: usize, offset: usize, block: &mut [bf16]) {
        if offset.is_multiple_of(HALF_KEYS) {
            return;
        }
        let term = offset % STEP;
        for tile in half_of(block, offset).chunks_exact_mut(TILE) {
            if !term.is_multiple_of(2) {
                let line = &mut tile[term / 2 * STEP..][..STEP];
                line.as_chunks_mut::<2>().0.iter_mut().for_each(|pair| pair[1] = bf16::ZERO);
            }
            tile[term.div_ceil(2) * STEP..].fill(bf16::ZERO);
        }
    }

    #[inline(always)]
    fn prefetch_keys(keys: &[bf16], range: (usize, usize)) {
        prefetch(halves(keys, range));
    }

    fn prefetch_place(keys: &[bf16], values: &[bf16], offset: usize) {
        let half = keys.len() / 2;
        for step in keys[offset / HALF_KEYS * half..][..half].chunks_exact(2 * TILE) {
            prefetch(&step[offset % STEP / LANES * TILE..][..TILE]);
        }
        for tile in values[offset / HALF_KEYS * half..][..half].chunks_exact(TILE) {
            prefetch_line(&raw const tile[offset % STEP / 2 * STEP]);
        }
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
        for (index, tile) in keys.chunks_exact(TILE).enumerate() {
            let (step, group) = (index / 2 % (keys.len() / (4 * TILE)), index % 2);
            let key = index / (keys.len() / (2 * TILE)) * HALF_KEYS + group * LANES;
            let rows = scratch.keys[step * STEP * BLOCK_KEYS..].chunks_mut(2 * BLOCK_KEYS);
            for (out, line) in rows.zip(tile.chunks_exact(STEP)) {
                split_pairs(line, &mut out[key..], BLOCK_KEYS);
            }
        }
        let stride = padded(head_dim);
        for (index, tile) in values.chunks_exact(TILE).enumerate() {
            let tiles_of_half = values.len() / (2 * TILE);
            let (half, column) = (index / tiles_of_half, index % tiles_of_half * LANES);
            if column < stride {
                let rows = scratch.values[half * HALF_KEYS * stride..].chunks_mut(2 * stride);
                for (out, line) in rows.zip(tile.chunks_exact(STEP)) {
                    split_pairs(line, &mut out[column..], stride);
                }
            }
        }
        (&scratch.keys, &scratch.values)
    }
}

/// The half of a block of one head that a key is in.
fn half_of(block: &mut [bf16], key: usize) -> &mut [bf16] {
    let half = block.len() / 2;
    &mut block[key / HALF_KEYS * half..][..half]
}

/// Widens the first elements of the 16 pairs of `line` to the start of `out`, the second to `width` further on, if that is
/// there.
fn split_pairs(line: &[bf16], out: &mut [f32], width: usize) {
    for (part, out) in out.chunks_mut(width).take(2).enumerate() {
        for (out, pair) in out.iter_mut().zip(line.as_chunks::<2>().0) {
            *out = pair[part].wide();
        }
    }
}
