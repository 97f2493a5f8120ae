//! Bf16 attention on matrix tiles: products of bf16 with sums in f32, everything between in AVX-512.
//!
//! The order of arithmetic is that of [`super`] with these differences: exponentials are powers of two, the
//! probabilities enter `P V` rounded to bf16 (their sum is of the unrounded), and a product's chain runs over pairs, as
//! the tiles do it. In the backward, `P` and `dS` enter their products rounded to bf16.
//!
//! A row of a tile does not know its neighbours, so a decoded row has the bits of the forward's. Probabilities of hidden
//! keys are exactly zero and add zeros, whose sign the final division takes away.

mod backward;
mod decode;
mod forward;
mod product;
mod scores;
mod vector;

pub(super) use backward::backward;
pub(super) use decode::decode;
pub(super) use forward::forward;

use std::mem::MaybeUninit;

use half::bf16;

use super::blocks::Block;
use super::layout::padded_pairs;
use super::{AttentionSpec, BLOCK_KEYS};
use crate::gemm::Output;

/// Elements of one head's block in any of its layouts.
fn block_len(spec: &AttentionSpec) -> usize {
    padded_pairs(spec.head_dim) * BLOCK_KEYS
}

/// The columns of one head in rows of `width`.
#[derive(Clone, Copy)]
struct Head<'a> {
    /// The rows.
    source: &'a [bf16],
    width: usize,
    /// First column.
    column: usize,
    /// Columns, D.
    head_dim: usize,
}

impl<'a> Head<'a> {
    /// Head `number` of the rows of `block` in `source [T, width]`.
    fn of(source: &'a [bf16], width: usize, block: &Block, number: usize, spec: &AttentionSpec) -> Self {
        let source = &source[block.start() * width..][..block.rows * width];
        Self { source, width, column: number * spec.head_dim, head_dim: spec.head_dim }
    }

    fn rows(&self) -> usize {
        self.source.len() / self.width
    }

    /// Whether tiles can load its rows where they lie: whole tiles of them, none across cache lines.
    fn lies_in_tiles(&self) -> bool {
        let whole = self.rows().is_multiple_of(32) && self.head_dim.is_multiple_of(32);
        whole && self.width.is_multiple_of(32) && self.source[self.column..].as_ptr().addr().is_multiple_of(64)
    }

    fn row(&self, row: usize) -> &'a [bf16] {
        &self.source[row * self.width + self.column..][..self.head_dim]
    }
}

/// A cache line, so that tile rows do not straddle two.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Zeroed room for numbers, aligned to cache lines.
struct Room<T> {
    lines: Vec<Line>,
    len: usize,
    element: std::marker::PhantomData<T>,
}

/// A number of which zero bits are one.
trait Number: Copy {}
impl Number for bf16 {}
impl Number for f32 {}

impl<T: Number> Room<T> {
    fn new(len: usize) -> Self {
        let lines = (len * size_of::<T>()).div_ceil(size_of::<Line>());
        Self { lines: vec![Line([0; 64]); lines], len, element: std::marker::PhantomData }
    }
}

impl<T: Number> std::ops::Deref for Room<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: the lines hold at least `len` numbers, all bits of which were written, and any bits are a number.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }
}

impl<T: Number> std::ops::DerefMut for Room<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

/// The `len` elements from `from` on of a result of which tasks write disjoint parts; they need not be initialised.
///
/// # Safety
/// No other part that overlaps may be alive.
#[expect(clippy::mut_from_ref, reason = "the parts of a result are disjoint by contract")]
#[inline(always)]
unsafe fn part<'a, T: Copy>(output: &'a Output<'_, T>, from: usize, len: usize) -> &'a mut [MaybeUninit<T>] {
    assert!(from + len <= output.len(), "part {from} + {len} of {}", output.len());
    // SAFETY: in bounds, and exclusive by contract.
    unsafe { std::slice::from_raw_parts_mut(output.start().add(from).cast(), len) }
}
