//! Reductions over whole tensors whose result does not depend on the number of threads.
//!
//! A tensor is cut into chunks of a fixed number of elements; a chunk is summed in f64 in a fixed number of lanes; the
//! chunks' sums are added pairwise. Only the length decides the order, so ranks that hold the same numbers get the
//! same bits. The square of an f32 is exact in f64.

mod cpu;

use candle_core::Tensor;

use crate::Result;
use crate::view::view;

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
