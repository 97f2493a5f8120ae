//! Matrix products of a linear layer: forward, input gradient, weight gradient.
//!
//! Every output element is `Σ_k a·b`, summed in blocks of [`K_BLOCK`] terms: inside a block one chain of fused
//! multiply-adds in the order of `k`, then the blocks in order. Nothing else enters the order of arithmetic: not the
//! number of rows (a single row included), not the tiling, not the threads, not the instruction set. That is what lets
//! a decode step of one row and a training forward of thousands agree bit for bit; general GEMM libraries take another
//! path for a single row.
//!
//! Matrices of bf16 are multiplied by instructions that sum in an order of their own; see [`Bf16Path`]. All else holds
//! for them too, with blocks of [`K_BLOCK_BF16`] terms, sums in f32, and one rounding at the end where the result is
//! bf16.

#[cfg(target_arch = "x86_64")]
mod avx512;
mod bf16;
mod block;
mod few;
mod micro;
mod output;
mod pack;
mod packed;
mod task;

use candle_core::{DType, Tensor};
use rayon::prelude::*;

use crate::element::{Element, with_element};
use crate::error::check_dims;
use crate::profile::{Class, time};
use crate::simd::simd_fn;
use crate::view::{tensor, view, view_mut, view_of};
use crate::{Error, Result};

#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::{each_row, multiply_add};
pub use bf16::{Bf16Path, K_BLOCK_BF16};
pub(crate) use packed::packed;
pub use packed::{PackedMatrix, linear_packed, linear_packed_f32, row_maxima};

pub(crate) use bf16::{Factor, Operand, PackedOperand, Product, Start, Stored, multiply, multiply_here, narrow_row};
pub(crate) use block::{Gemm, PackedRight, Right, gemm, gemm_here};
pub(crate) use output::{Output, filled};
pub(crate) use pack::transpose;

/// Terms of a dot product that are summed in one chain before the running total is touched.
///
/// Part of the definition of the result: another value gives other bits.
pub const K_BLOCK: usize = 256;

/// `y = x·Wᵀ + bias`: `x [T, k]`, `w [n, k]`, `bias [n]` → `[T, n]`, all f32 or all bf16.
///
/// The bias of a bf16 layer may also be f32; it is added in f32, before the one rounding.
///
/// # Errors
/// Shapes or dtypes that do not fit, another device than the CPU, a non-contiguous argument.
pub fn linear(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    const OP: &str = "linear";
    match w.dtype() {
        DType::BF16 => linear_bf16::<half::bf16>(OP, x, w, bias),
        _ => linear_full(OP, x, w, bias),
    }
}

/// [`linear`] with the result in f32, of bf16 matrices too: for what is added to a residual stream kept in f32.
///
/// # Errors
/// As [`linear`].
pub fn linear_f32(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    full_linear("linear_f32", x, w, bias)
}

/// [`linear_f32`] under the name of the operation that a caller asked for.
pub(crate) fn full_linear(op: &'static str, x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    match w.dtype() {
        DType::BF16 => linear_bf16::<f32>(op, x, w, bias),
        _ => linear_full(op, x, w, bias),
    }
}

/// Rows, outputs and inputs of a linear layer.
fn linear_sizes(op: &'static str, x: &Tensor, w: &Tensor) -> Result<(usize, usize, usize)> {
    let (rows, k) = dims2(op, "x", x)?;
    let (n, wk) = dims2(op, "w", w)?;
    check_dims(op, "columns of w", &[k], &[wk])?;
    Ok((rows, n, k))
}

/// [`linear`] in f32.
fn linear_full(op: &'static str, x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (rows, n, k) = linear_sizes(op, x, w)?;
    let _timer = time(Class::Linear, 2 * rows * n * k);
    let (xv, wv) = (view(op, x)?, view(op, w)?);
    if let Some(bias) = bias {
        check_dims(op, "bias", &[n], bias.dims())?;
    }
    let bias = bias.map(|bias| view(op, bias)).transpose()?;
    tensor(product_full(rows, n, k, &xv, Right::Strided(&wv, (1, k)), bias.as_deref()), (rows, n))
}

/// The f32 product of a contiguous `[m, k]` in a vector of its own.
pub(crate) fn product_full(m: usize, n: usize, k: usize, a: &[f32], b: Right<'_>, bias: Option<&[f32]>) -> Vec<f32> {
    let run = |c: Output<'_, f32>, accumulate: bool| {
        gemm(Gemm { m, n, k, a, a_row_stride: k, a_col_stride: 1, b, c, c_row_stride: n, accumulate })
    };
    match bias {
        // SAFETY: a product that does not accumulate writes each of its m × n elements and reads none.
        None => unsafe { filled(m * n, |c| run(c, false)) },
        Some(bias) => {
            let mut y = bias.repeat(m);
            run(Output::new(&mut y), true);
            y
        }
    }
}

/// [`linear`] of bf16 matrices into either type.
fn linear_bf16<E: Stored>(op: &'static str, x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (rows, n, k) = linear_sizes(op, x, w)?;
    let _timer = time(Class::Linear, 2 * rows * n * k);
    let (xv, wv) = (view_of::<half::bf16>(op, x)?, view_of::<half::bf16>(op, w)?);
    let bias = bias.map(|bias| bias_values(op, bias, w)).transpose()?;
    let y =
        product::<E>(rows, n, k, Operand::along_k(&xv, k), Factor::Plain(Operand::along_k(&wv, k)), bias.as_deref());
    tensor(y, (rows, n))
}

/// The bf16 product `[m, n]` in a vector of its own.
pub(crate) fn product<E: Stored>(
    m: usize,
    n: usize,
    k: usize,
    a: Operand<'_>,
    b: Factor<'_>,
    bias: Option<&[f32]>,
) -> Vec<E> {
    let start = bias.map_or(Start::Zero, Start::Bias);
    // SAFETY: a product that does not start from its output writes each of its m × n elements and reads none.
    unsafe { filled(m * n, |c| multiply(Product { m, n, k, a, b, start, c })) }
}

/// A bias of the layer whose weight, `[n, k]`, is `w`, as f32. It has the dtype of the weight, or f32.
pub(crate) fn bias_values(op: &'static str, bias: &Tensor, w: &Tensor) -> Result<Vec<f32>> {
    bias_of(op, bias, w.dims()[0], w.dtype())
}

/// [`bias_values`] for the sizes of a weight.
fn bias_of(op: &'static str, bias: &Tensor, n: usize, weight: DType) -> Result<Vec<f32>> {
    check_dims(op, "bias", &[n], bias.dims())?;
    if bias.dtype() != weight && bias.dtype() != DType::F32 {
        return Err(Error::Dtype { op, dtype: bias.dtype() });
    }
    with_element!(op, bias.dtype(), E => Ok(view_of::<E>(op, bias)?.iter().map(|value| value.wide()).collect()))
}

/// Gradient of [`linear`] for its input: `dx = dy·W`, `dy [T, n]`, `w [n, k]` → `[T, k]`, all f32 or all bf16.
///
/// # Errors
/// As [`linear`].
pub fn linear_input_grad(dy: &Tensor, w: &Tensor) -> Result<Tensor> {
    const OP: &str = "linear_input_grad";
    match w.dtype() {
        DType::BF16 => input_grad_bf16::<half::bf16>(OP, dy, w),
        _ => input_grad_full(OP, dy, w),
    }
}

/// [`linear_input_grad`] with the result in f32, of bf16 matrices too.
///
/// # Errors
/// As [`linear`].
pub fn linear_input_grad_f32(dy: &Tensor, w: &Tensor) -> Result<Tensor> {
    const OP: &str = "linear_input_grad_f32";
    match w.dtype() {
        DType::BF16 => input_grad_bf16::<f32>(OP, dy, w),
        _ => input_grad_full(OP, dy, w),
    }
}

/// Rows, outputs and inputs of the layer whose input gradient is asked for.
fn input_grad_sizes(op: &'static str, dy: &Tensor, w: &Tensor) -> Result<(usize, usize, usize)> {
    let (rows, n) = dims2(op, "dy", dy)?;
    let (wn, k) = dims2(op, "w", w)?;
    check_dims(op, "rows of w", &[n], &[wn])?;
    Ok((rows, n, k))
}

fn input_grad_full(op: &'static str, dy: &Tensor, w: &Tensor) -> Result<Tensor> {
    let (rows, n, k) = input_grad_sizes(op, dy, w)?;
    let _timer = time(Class::InputGradient, 2 * rows * n * k);
    let (dyv, wv) = (view(op, dy)?, view(op, w)?);
    tensor(product_full(rows, k, n, &dyv, Right::Strided(&wv, (k, 1)), None), (rows, k))
}

fn input_grad_bf16<E: Stored>(op: &'static str, dy: &Tensor, w: &Tensor) -> Result<Tensor> {
    let (rows, n, k) = input_grad_sizes(op, dy, w)?;
    let _timer = time(Class::InputGradient, 2 * rows * n * k);
    let (dyv, wv) = (view_of::<half::bf16>(op, dy)?, view_of::<half::bf16>(op, w)?);
    let b = Factor::Plain(Operand::across_k(&wv, k));
    tensor(product::<E>(rows, k, n, Operand::along_k(&dyv, n), b, None), (rows, k))
}

/// Gradient of [`linear`] for its weight, added in place: `dw += dyᵀ·x`, `dy [T, n]`, `x [T, k]`, both f32 or both bf16;
/// `dw [n, k]`, f32.
///
/// # Errors
/// As [`linear`].
pub fn linear_weight_grad(dy: &Tensor, x: &Tensor, dw: &Tensor) -> Result<()> {
    const OP: &str = "linear_weight_grad";
    let (rows, n) = dims2(OP, "dy", dy)?;
    let (xr, k) = dims2(OP, "x", x)?;
    let _timer = time(Class::WeightGradient, 2 * rows * n * k);
    check_dims(OP, "rows of x", &[rows], &[xr])?;
    check_dims(OP, "dw", &[n, k], dw.dims())?;
    if dy.dtype() == DType::BF16 {
        let (dyv, xv) = (view_of::<half::bf16>(OP, dy)?, view_of::<half::bf16>(OP, x)?);
        let (a, b) = (Operand::across_k(&dyv, n), Factor::Plain(Operand::across_k(&xv, k)));
        return view_mut(OP, dw, |dw| {
            multiply(Product { m: n, n: k, k: rows, a, b, start: Start::Output, c: Output::new(dw) });
        });
    }
    let (dyv, xv) = (view(OP, dy)?, view(OP, x)?);
    view_mut(OP, dw, |dw| {
        gemm(Gemm {
            m: n,
            n: k,
            k: rows,
            a: &dyv,
            a_row_stride: 1,
            a_col_stride: n,
            b: Right::Strided(&xv, (k, 1)),
            c: Output::new(dw),
            c_row_stride: k,
            accumulate: true,
        });
    })
}

/// Gradient of [`linear`] for its bias, added in place: `db += Σ_t dy[t]`, `dy [T, n]`, f32 or bf16; `db [n]`, f32.
///
/// Rows are summed in blocks of [`K_BLOCK`], as in the products.
///
/// # Errors
/// As [`linear`].
pub fn bias_grad(dy: &Tensor, db: &Tensor) -> Result<()> {
    /// Columns of a task.
    const COLUMNS: usize = 128;
    const OP: &str = "bias_grad";
    let (_, n) = dims2(OP, "dy", dy)?;
    let _timer = time(Class::WeightGradient, 0);
    check_dims(OP, "db", &[n], db.dims())?;
    with_element!(OP, dy.dtype(), E => {
        let dyv = view_of::<E>(OP, dy)?;
        view_mut(OP, db, |db| {
            db.par_chunks_mut(COLUMNS).enumerate().for_each(|(chunk, db)| {
                add_columns::<E>(&dyv, n, chunk * COLUMNS, db);
            });
        })
    })
}

simd_fn! {
    /// Adds the sum over rows, `width` apart, of each column from `first` on.
    fn add_columns<E: Element>(rows: &[E], width: usize, first: usize, sums: &mut [f32]) = add_columns_body;
}

#[inline(always)]
fn add_columns_body<E: Element, const FMA: bool>(rows: &[E], width: usize, first: usize, sums: &mut [f32]) {
    let mut partial = vec![0f32; sums.len()];
    for block in rows.chunks(K_BLOCK * width) {
        partial.fill(0.0);
        for row in block.chunks_exact(width) {
            for (p, v) in partial.iter_mut().zip(&row[first..]) {
                *p += v.wide();
            }
        }
        for (sum, p) in sums.iter_mut().zip(&partial) {
            *sum += p;
        }
    }
}

/// Both dimensions of a matrix, or a shape error naming the argument.
pub(crate) fn dims2(op: &'static str, what: &'static str, t: &Tensor) -> Result<(usize, usize)> {
    match *t.dims() {
        [rows, columns] => Ok((rows, columns)),
        ref other => Err(Error::shape(op, what, "a matrix", other)),
    }
}
