//! Matrix products of a linear layer: forward, input gradient, weight gradient.
//!
//! Every output element is `Σ_k a·b`, summed in blocks of [`K_BLOCK`] terms: inside a block one chain of fused
//! multiply-adds in the order of `k`, then the blocks in order. Nothing else enters the order of arithmetic: not the
//! number of rows (a single row included), not the tiling, not the threads, not the instruction set. That is what lets
//! a decode step of one row and a training forward of thousands agree bit for bit; general GEMM libraries take another
//! path for a single row.

mod block;
mod micro;
mod pack;

use candle_core::Tensor;

use crate::error::check_dims;
use crate::view::{tensor, view, view_mut};
use crate::{Error, Result};

pub(crate) use block::{Gemm, gemm};

/// Terms of a dot product that are summed in one chain before the running total is touched.
///
/// Part of the definition of the result: another value gives other bits.
pub const K_BLOCK: usize = 256;

/// `y = x·Wᵀ + bias`: `x [T, k]`, `w [n, k]`, `bias [n]` → `[T, n]`.
///
/// # Errors
/// Shapes that do not fit, another dtype than f32, another device than the CPU, a non-contiguous argument.
pub fn linear(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    const OP: &str = "linear";
    let (rows, k) = dims2(OP, "x", x)?;
    let (n, wk) = dims2(OP, "w", w)?;
    check_dims(OP, "columns of w", &[k], &[wk])?;
    let (xv, wv) = (view(OP, x)?, view(OP, w)?);
    let mut y = vec![0f32; rows * n];
    if let Some(bias) = bias {
        check_dims(OP, "bias", &[n], bias.dims())?;
        let b = view(OP, bias)?;
        y.chunks_exact_mut(n.max(1)).for_each(|row| row.copy_from_slice(&b));
    }
    gemm(Gemm {
        m: rows,
        n,
        k,
        a: &xv,
        a_row_stride: k,
        a_col_stride: 1,
        b: &wv,
        b_row_stride: 1,
        b_col_stride: k,
        c: &mut y,
        c_row_stride: n,
        accumulate: bias.is_some(),
    });
    tensor(y, (rows, n))
}

/// Gradient of [`linear`] for its input: `dx = dy·W`, `dy [T, n]`, `w [n, k]` → `[T, k]`.
///
/// # Errors
/// As [`linear`].
pub fn linear_input_grad(dy: &Tensor, w: &Tensor) -> Result<Tensor> {
    const OP: &str = "linear_input_grad";
    let (rows, n) = dims2(OP, "dy", dy)?;
    let (wn, k) = dims2(OP, "w", w)?;
    check_dims(OP, "rows of w", &[n], &[wn])?;
    let (dyv, wv) = (view(OP, dy)?, view(OP, w)?);
    let mut dx = vec![0f32; rows * k];
    gemm(Gemm {
        m: rows,
        n: k,
        k: n,
        a: &dyv,
        a_row_stride: n,
        a_col_stride: 1,
        b: &wv,
        b_row_stride: k,
        b_col_stride: 1,
        c: &mut dx,
        c_row_stride: k,
        accumulate: false,
    });
    tensor(dx, (rows, k))
}

/// Gradient of [`linear`] for its weight, added in place: `dw += dyᵀ·x`, `dy [T, n]`, `x [T, k]`, `dw [n, k]`.
///
/// # Errors
/// As [`linear`].
pub fn linear_weight_grad(dy: &Tensor, x: &Tensor, dw: &Tensor) -> Result<()> {
    const OP: &str = "linear_weight_grad";
    let (rows, n) = dims2(OP, "dy", dy)?;
    let (xr, k) = dims2(OP, "x", x)?;
    check_dims(OP, "rows of x", &[rows], &[xr])?;
    check_dims(OP, "dw", &[n, k], dw.dims())?;
    let (dyv, xv) = (view(OP, dy)?, view(OP, x)?);
    view_mut(OP, dw, |dw| {
        gemm(Gemm {
            m: n,
            n: k,
            k: rows,
            a: &dyv,
            a_row_stride: 1,
            a_col_stride: n,
            b: &xv,
            b_row_stride: k,
            b_col_stride: 1,
            c: dw,
            c_row_stride: k,
            accumulate: true,
        });
    })
}

/// Gradient of [`linear`] for its bias, added in place: `db += Σ_t dy[t]`, `dy [T, n]`, `db [n]`.
///
/// Rows are summed in blocks of [`K_BLOCK`], as in the products.
///
/// # Errors
/// As [`linear`].
pub fn bias_grad(dy: &Tensor, db: &Tensor) -> Result<()> {
    const OP: &str = "bias_grad";
    let (_, n) = dims2(OP, "dy", dy)?;
    check_dims(OP, "db", &[n], db.dims())?;
    let dyv = view(OP, dy)?;
    view_mut(OP, db, |db| {
        let mut partial = vec![0f32; n];
        for block in dyv.chunks(K_BLOCK * n.max(1)) {
            partial.fill(0.0);
            for row in block.chunks_exact(n.max(1)) {
                for (p, v) in partial.iter_mut().zip(row) {
                    *p += v;
                }
            }
            for (d, p) in db.iter_mut().zip(&partial) {
                *d += p;
            }
        }
    })
}

/// Both dimensions of a matrix, or a shape error naming the argument.
pub(crate) fn dims2(op: &'static str, what: &'static str, t: &Tensor) -> Result<(usize, usize)> {
    match *t.dims() {
        [rows, columns] => Ok((rows, columns)),
        ref other => Err(Error::shape(op, what, "a matrix", other)),
    }
}
