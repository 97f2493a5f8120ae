//! Sequences cut into blocks of 64 tokens, and keys and values packed per block as the tiles read them.

use std::mem::MaybeUninit;

use super::BLOCK_KEYS;
use crate::element::Element;
use crate::gemm::Output;
use crate::math::LANES;
#[cfg(target_arch = "x86_64")]
use crate::prefetch::{LINE, prefetch_line_to_write};
use crate::room::Room;

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
    #[cfg(target_arch = "x86_64")]
    source.chunks_exact(width).for_each(|line| fetch(&line[column..column + head_dim]));
    for (block, line) in block.zip(source.chunks_exact(width)) {
        let line = &line[column..column + head_dim];
        let ((to, _), (from, rest)) = (block.as_chunks_mut::<LANES>(), line.as_chunks::<LANES>());
        for (to, from) in to.iter_mut().zip(from) {
            *to = from.map(|value| value.wide());
        }
        if let Some(to) = to.get_mut(from.len()) {
            to.iter_mut().zip(rest).for_each(|(to, from)| *to = from.wide());
        }
    }
}

/// Asks for a row: rows of a batch lie in different pages, and one after the other, each would wait for memory.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn fetch<E>(row: &[E]) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    for line in row.chunks(64 / size_of::<E>()) {
        // SAFETY: a hint that reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
}

/// Packs the head of `head_dim` columns at `column` of consecutive blocks of one sequence of `source [T, width]`, by rows:
/// `[blocks, 64, D padded]`.
///
/// Tokens beyond the end of the sequence and columns beyond the head are zero.
pub(super) fn pack<'a, E: Element>(
    source: &[E],
    width: usize,
    column: usize,
    head_dim: usize,
    blocks: &[Block],
    room: &'a mut Room,
) -> &'a [f32] {
    let (stride, size) = (padded(head_dim), padded(head_dim) * BLOCK_KEYS);
    let packed = room.first(blocks.len() * size);
    for (packed, block) in packed.chunks_exact_mut(size).zip(blocks) {
        if stride == head_dim {
            packed[block.rows * stride..].fill(0.0);
        } else {
            packed.fill(0.0);
        }
        copy_head(&source[block.start() * width..][..block.rows * width], width, column, head_dim, 0, packed);
    }
    packed
}

/// The rows of a result, of which every task writes its own heads; they need not be initialised.
pub(super) struct HeadRows<'a, E> {
    values: Output<'a, E>,
    width: usize,
    head_dim: usize,
}

impl<'a, E: Element> HeadRows<'a, E> {
    /// Rows of `width` with heads of `head_dim` columns.
    pub(super) fn new(values: Output<'a, E>, width: usize, head_dim: usize) -> Self {
        Self { values, width, head_dim }
    }

    /// The first element, to ask for.
    pub(super) fn start(&self) -> *const E {
        self.values.start()
    }

    /// Rounds rows `from`, which lie `stride` apart, to the head at `column` of the rows from `token` on.
    ///
    /// # Safety
    /// No other task reads or writes these heads.
    pub(super) unsafe fn write(&self, token: usize, rows: usize, column: usize, from: &[f32], stride: usize) {
        assert!(column + self.head_dim <= self.width && (token + rows) * self.width <= self.values.len());
        #[cfg(target_arch = "x86_64")]
        if crate::Isa::active() >= crate::Isa::Avx512 {
            // Rows lie in different pages: one after the other, each store would wait for its line.
            for row in 0..rows {
                let start = self.values.start().wrapping_add((token + row) * self.width + column).cast::<u8>();
                for line in (0..self.head_dim * size_of::<E>()).step_by(LINE) {
                    prefetch_line_to_write(start.wrapping_add(line));
                }
            }
        }
        for (row, from) in from.chunks(stride).take(rows).enumerate() {
            // SAFETY: the elements exist, as just checked, and are this task's alone.
            let to = unsafe {
                let at = self.values.start().add((token + row) * self.width + column);
                std::slice::from_raw_parts_mut(at.cast::<MaybeUninit<E>>(), self.head_dim)
            };
            // A vector at a time: a row is too short for a call that copies it.
            let ((vectors, rest), (from, last)) = (to.as_chunks_mut::<LANES>(), from.as_chunks::<LANES>());
            let end = from[vectors.len()..].as_flattened().iter().chain(last);
            for (to, from) in vectors.iter_mut().zip(from) {
                *to = from.map(|value| MaybeUninit::new(E::narrow(value)));
            }
            rest.iter_mut().zip(end).for_each(|(to, from)| *to = MaybeUninit::new(E::narrow(*from)));
        }
    }
}
