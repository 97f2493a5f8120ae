//! Activations of the feed-forward layer, plain and gated, each with its backward in one pass.
//!
//! - SiLU (Elfwing et al. 2018): `x σ(x)`
//! - GELU (Hendrycks and Gimpel 2016): `x Φ(x)`, and its tanh form `x/2 (1 + tanh(√(2/π) (x + 0.044715 x³)))`
//! - gated units (Shazeer 2020, *GLU variants*): `act(gate) · up`
//!
//! The tanh form is computed as the equal `x σ(2u)`, which keeps its digits for negative `x`. All tensors of a call are
//! of one dtype, f32 or bf16.

use candle_core::Tensor;

use crate::element::with_element;
use crate::error::{check_dims, check_dtype};
use crate::profile::{Class, time};
use crate::view::{Output, view_of};
use crate::{Error, Result};

mod cpu;
#[cfg(target_arch = "x86_64")]
mod vector;

/// The nonlinearity of a feed-forward layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x σ(x)`.
    Silu,
    /// GELU by tanh (`gelu_new`, `gelu_pytorch_tanh`).
    GeluTanh,
    /// GELU by the error function (`gelu`).
    GeluErf,
    /// `max(x, 0)`.
    Relu,
}

/// Rows and columns of a matrix.
fn matrix(op: &'static str, what: &'static str, x: &Tensor) -> Result<(usize, usize)> {
    match *x.dims() {
        [rows, columns] => Ok((rows, columns)),
        _ => Err(Error::shape(op, what, "a matrix", x.dims())),
    }
}

/// Rows `T` and width `f` of a `gate_up [T, 2f]`.
fn gated_dims(op: &'static str, gate_up: &Tensor) -> Result<(usize, usize)> {
    let (rows, columns) = matrix(op, "gate_up", gate_up)?;
    if !columns.is_multiple_of(2) {
        return Err(Error::shape(op, "gate_up", "[T, 2f]", gate_up.dims()));
    }
    Ok((rows, columns / 2))
}

/// `act(gate) · up` for `gate_up [T, 2f]`, whose first `f` columns are the gate; returns `[T, f]`.
///
/// # Errors
/// If the shape, dtype or device does not fit.
pub fn gated(gate_up: &Tensor, act: Activation) -> Result<Tensor> {
    let _timer = time(Class::Mlp, 0);
    const OP: &str = "gated";
    let (rows, width) = gated_dims(OP, gate_up)?;
    with_element!(OP, gate_up.dtype(), E => {
        let mut y = Output::<E>::new(rows * width);
        cpu::gated(&view_of::<E>(OP, gate_up)?, width, act, &mut y);
        y.into_tensor((rows, width))
    })
}

/// Backward of [`gated`]: `dy [T, f]` to the gradient of `gate_up`, `[T, 2f]`.
///
/// # Errors
/// If a shape, dtype or device does not fit.
pub fn gated_backward(dy: &Tensor, gate_up: &Tensor, act: Activation) -> Result<Tensor> {
    let _timer = time(Class::Mlp, 0);
    const OP: &str = "gated_backward";
    let (rows, width) = gated_dims(OP, gate_up)?;
    check_dims(OP, "dy", &[rows, width], dy.dims())?;
    check_dtype(OP, "dtype of dy", gate_up.dtype(), dy)?;
    with_element!(OP, gate_up.dtype(), E => {
        let mut dx = Output::<E>::new(rows * 2 * width);
        cpu::gated_backward(&view_of::<E>(OP, dy)?, &view_of::<E>(OP, gate_up)?, width, act, &mut dx);
        dx.into_tensor((rows, 2 * width))
    })
}

/// Backward of [`gated`] and, along the way, [`gated`] itself to the bit: the gradient of `gate_up`, `[T, 2f]`, and
/// `act(gate) · up`, `[T, f]`, for callers that have not kept it.
///
/// # Errors
/// If a shape, dtype or device does not fit.
pub fn gated_backward_again(dy: &Tensor, gate_up: &Tensor, act: Activation) -> Result<(Tensor, Tensor)> {
    let _timer = time(Class::Mlp, 0);
    const OP: &str = "gated_backward_again";
    let (rows, width) = gated_dims(OP, gate_up)?;
    check_dims(OP, "dy", &[rows, width], dy.dims())?;
    check_dtype(OP, "dtype of dy", gate_up.dtype(), dy)?;
    with_element!(OP, gate_up.dtype(), E => {
        let (mut dx, mut y) = (Output::<E>::new(rows * 2 * width), Output::<E>::new(rows * width));
        cpu::gated_backward_again(&view_of::<E>(OP, dy)?, &view_of::<E>(OP, gate_up)?, width, act, &mut dx, &mut y);
        Ok((dx.into_tensor((rows, 2 * width))?, y.into_tensor((rows, width))?))
    })
}

/// `act(x)`, element by element, for `x [T, f]`.
///
/// # Errors
/// If the shape, dtype or device does not fit.
pub fn activation(x: &Tensor, act: Activation) -> Result<Tensor> {
    let _timer = time(Class::Mlp, 0);
    const OP: &str = "activation";
    let (rows, width) = matrix(OP, "x", x)?;
    with_element!(OP, x.dtype(), E => {
        let mut y = Output::<E>::new(rows * width);
        cpu::activation(&view_of::<E>(OP, x)?, act, &mut y);
        y.into_tensor((rows, width))
    })
}

/// Backward of [`activation`]: `dy · act'(x)`, all `[T, f]`.
///
/// # Errors
/// If a shape, dtype or device does not fit.
pub fn activation_backward(dy: &Tensor, x: &Tensor, act: Activation) -> Result<Tensor> {
    let _timer = time(Class::Mlp, 0);
    const OP: &str = "activation_backward";
    let (rows, width) = matrix(OP, "x", x)?;
    check_dims(OP, "dy", &[rows, width], dy.dims())?;
    check_dtype(OP, "dtype of dy", x.dtype(), dy)?;
    with_element!(OP, x.dtype(), E => {
        let mut dx = Output::<E>::new(rows * width);
        cpu::activation_backward(&view_of::<E>(OP, dy)?, &view_of::<E>(OP, x)?, act, &mut dx);
        dx.into_tensor((rows, width))
    })
}
