//! Inverted dropout with a mask that is a pure function of its address (Srivastava et al. 2014).
//!
//! `y = x · mask / (1 - p)`, where `mask` is 0 with probability `p`, drawn from (stream, sample, position, site, column). No
//! mask is stored: the backward is the same call on the gradient, and a token's mask does not depend on the batch.

use candle_core::Tensor;

use crate::element::with_element;
use crate::profile::{Class, time};
use crate::rng::Philox;
use crate::view::{Output, view_of};
use crate::{Error, Result};

mod cpu;

/// Widest row: columns are counted in the low half of a 32-bit counter, four to a draw.
const MAX_WIDTH: usize = 4 << 16;

/// Drops elements of `x [T, d]`, f32 or bf16, with probability `p` and divides the others by `1 - p`; returns `[T, d]` of
/// the same dtype.
///
/// Row `t` is addressed by `rows[t]`, a (sample, position), in the stream `philox`; `site` tells the dropouts of a model
/// apart. The backward is the same call on `dy`. With `p = 0` the input is returned as it is.
///
/// # Errors
/// If `p` is not in `[0, 1)`, d exceeds 262144, or a shape, dtype or device does not fit.
pub fn dropout(x: &Tensor, p: f32, philox: &Philox, site: u16, rows: &[(u64, u32)]) -> Result<Tensor> {
    dropout_columns(x, 0, p, philox, site, rows)
}

/// What [`dropout`] makes of the columns `first_column..first_column + d` of wider rows: the mask of a rank that holds no
/// others.
///
/// # Errors
/// As [`dropout`], of the wider rows.
pub fn dropout_columns(
    x: &Tensor,
    first_column: usize,
    p: f32,
    philox: &Philox,
    site: u16,
    rows: &[(u64, u32)],
) -> Result<Tensor> {
    let _timer = time(Class::Rows, 0);
    const OP: &str = "dropout";
    let &[tokens, width] = x.dims() else {
        return Err(Error::shape(OP, "x", "[T, d]", x.dims()));
    };
    if rows.len() != tokens {
        return Err(Error::shape(OP, "number of row addresses", tokens, rows.len()));
    }
    let end = first_column.saturating_add(width);
    if end > MAX_WIDTH {
        return Err(Error::shape(OP, "width", format!("at most {MAX_WIDTH}"), end));
    }
    if !(0.0..1.0).contains(&p) {
        return Err(Error::shape(OP, "p", "in [0, 1)", p));
    }
    if p == 0.0 {
        return Ok(x.clone());
    }
    with_element!(OP, x.dtype(), E => {
        let mut y = Output::<E>::new(tokens * width);
        cpu::dropout(&view_of::<E>(OP, x)?, width, first_column, p, philox, site, rows, &mut y);
        y.into_tensor((tokens, width))
    })
}
