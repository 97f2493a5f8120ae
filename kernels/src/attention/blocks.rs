//! Sequences cut into blocks of 64 tokens, and keys and values packed per block as the tiles read them.

use rayon::prelude::*;

use super::{AttentionSpec, BLOCK_KEYS};
use crate::element::Element;
use crate::math::LANES;

/// Up to 64 consecutive tokens of one sequence, counted from its start.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block {
    /// Row of the packed batch at which the sequence starts.
    pub(super) sequence: usize,
    /// Tokens of the sequence.
    pub(super) len: usize,
    /// Position of the block's first token in the sequence; a multiple of 64.
    pub(super) position: usize,
    /// Tokens of the block.
    pub(super) rows: usize,
    /// Index of the sequence's first block among all blocks.
    pub(super) first: usize,
}

impl Block {
    /// Row of the packed batch at which the block starts.
    pub(super) fn start(&self) -> usize {
        self.sequence + self.position
    }
}

/// The blocks of all sequences, in order.
pub(super) fn cut(cu_seqlens: &[u32]) -> Vec<Block> {
    let mut blocks = Vec::new();
    for bounds in cu_seqlens.windows(2) {
        let (sequence, end) = (bounds[0] as usize, bounds[1] as usize);
        let (len, first) = (end - sequence, blocks.len());
        blocks.extend((0..len).step_by(BLOCK_KEYS).map(|position| {
            let rows = BLOCK_KEYS.min(len - position);
            Block { sequence, len, position, rows, first }
        }));
    }
    blocks
}

/// Head width rounded up to whole vectors.
pub(super) fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(LANES)
}

/// Elements of one head's transposed block, `[D, 64]`.
pub(super) fn transposed_len(spec: &AttentionSpec) -> usize {
    spec.head_dim * BLOCK_KEYS
}

/// Elements of one head's block by rows, `[64, D padded]`.
pub(super) fn rows_len(spec: &AttentionSpec) -> usize {
    padded(spec.head_dim) * BLOCK_KEYS
}

/// Writes the head of `head_dim` columns at `column` of each of `source`'s rows (of `width`) to `block [D, 64]`,
/// transposed, from key `offset` on.
pub(super) fn transpose_head<E: Element>(source: &[E], width: usize, column: usize, offset: usize, block: &mut [f32]) {
    let head_dim = block.len() / BLOCK_KEYS;
    for (row, source) in source.chunks_exact(width).enumerate() {
        for (d, value) in source[column..column + head_dim].iter().enumerate() {
            block[d * BLOCK_KEYS + offset + row] = value.wide();
        }
    }
}

/// As [`transpose_head`], but to `block [64, D padded]` by rows.
pub(super) fn copy_head<E: Element>(
    source: &[E],
    width: usize,
    column: usize,
    head_dim: usize,
    offset: usize,
    block: &mut [f32],
) {
    let stride = padded(head_dim);
    let block = block[offset * stride..].chunks_exact_mut(stride);
    for (block, source) in block.zip(source.chunks_exact(width)) {
        for (value, source) in block.iter_mut().zip(&source[column..column + head_dim]) {
            *value = source.wide();
        }
    }
}

/// How [`pack`] lays out a block of a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pack {
    /// `[D, 64]`.
    Transposed,
    /// `[64, D padded]`.
    Rows,
}

/// Packs `heads` heads of `source [T, width]`, the first of them at `column`: `[blocks, heads, block of a head]`.
///
/// Tokens beyond the end of a sequence and columns beyond the head are zero.
pub(super) fn pack<E: Element>(
    source: &[E],
    width: usize,
    column: usize,
    heads: usize,
    blocks: &[Block],
    spec: &AttentionSpec,
    layout: Pack,
) -> Vec<f32> {
    let size = match layout {
        Pack::Transposed => transposed_len(spec),
        Pack::Rows => rows_len(spec),
    };
    let mut packed = vec![0.0; blocks.len() * heads * size];
    packed.par_chunks_mut(heads * size).zip(blocks).for_each(|(packed, block)| {
        let source = &source[block.start() * width..][..block.rows * width];
        for (head, packed) in packed.chunks_exact_mut(size).enumerate() {
            let column = column + head * spec.head_dim;
            match layout {
                Pack::Transposed => transpose_head(source, width, column, 0, packed),
                Pack::Rows => copy_head(source, width, column, spec.head_dim, 0, packed),
            }
        }
    });
    packed
}
