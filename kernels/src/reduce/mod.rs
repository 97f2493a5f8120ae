//! Reductions over whole tensors whose result does not depend on the number of threads.
//!
//! A tensor is cut into chunks of a fixed number of elements; a chunk is summed in f64 in a fixed number of lanes; the
//! chunks' sums are added pairwise. Only the length decides the order, so ranks that hold the same numbers get the
//! same bits. The square of an f32 is exact in f64.
//!
//! The functions on slices serve buffers that are cut over ranks: [`block_sum_squares`] leaves one number per block, so
//! that a norm summed over all blocks in order does not depend on who holds them.

mod cpu;

use candle_core::Tensor;

use crate::Result;
use crate::error::check_dims;
use crate::view::{view, view_mut};

/// Elements of a block of [`block_sum_squares`]. Part of the order of arithmetic: changing it changes results.
pub const BLOCK: usize = 1024;

/// Σ x over all elements of a contiguous f32 tensor, in f64.
pub fn sum(x: &Tensor) -> Result<f64> {
    Ok(cpu::sum(&view("sum", x)?))
}

/// Σ x² over all elements of a contiguous f32 tensor, in f64: the square of the gradient norm.
pub fn sum_squares(x: &Tensor) -> Result<f64> {
    Ok(cpu::sum_squares(&view("sum_squares", x)?))
}

/// The largest absolute value (0 for an empty tensor); NaN if any element is NaN.
pub fn max_abs(x: &Tensor) -> Result<f32> {
    Ok(cpu::max_abs(&view("max_abs", x)?))
}

/// Whether no element is infinite or NaN.
pub fn all_finite(x: &Tensor) -> Result<bool> {
    Ok(first_non_finite(x)?.is_none())
}

/// Flat index of the first element that is infinite or NaN.
pub fn first_non_finite(x: &Tensor) -> Result<Option<usize>> {
    Ok(cpu::first_non_finite(&view("first_non_finite", x)?))
}

/// Appends to `out` Σ x² of each [`BLOCK`] elements of `x`, from its start; the last block may be short.
///
/// Inside a block, element `i` goes to lane `i mod 16` and the lanes are added pairwise.
pub fn block_sum_squares(x: &[f32], out: &mut Vec<f64>) {
    cpu::block_sum_squares(x, out);
}

/// The sum of `values` in a binary tree that depends on their number only: joins what [`block_sum_squares`] left.
pub fn pairwise_sum(values: &[f64]) -> f64 {
    cpu::pairwise(values)
}

/// `target ← target + term`, element by element.
///
/// # Errors
/// [`crate::Error::Shape`] if the lengths differ.
pub fn add_slice(target: &mut [f32], term: &[f32]) -> Result<()> {
    check_dims("add_slice", "term", &[target.len()], &[term.len()])?;
    cpu::add(target, term);
    Ok(())
}

/// `target ← target + term` for f32 tensors of one shape, in place: a residual connection into the branch's output, which
/// nobody else reads.
///
/// # Errors
/// If a shape, dtype or device does not fit.
pub fn add_in_place(target: &Tensor, term: &Tensor) -> Result<()> {
    const OP: &str = "add_in_place";
    check_dims(OP, "term", target.dims(), term.dims())?;
    let term = view(OP, term)?;
    view_mut(OP, target, |target| cpu::add(target, &term))
}

/// `target ← target · factor`, element by element.
pub fn scale_slice(target: &mut [f32], factor: f32) {
    cpu::scale(target, factor);
}
