//! Loops of the activations.

#[cfg(target_arch = "x86_64")]
use candle_core::DType;
use rayon::prelude::*;

use super::Activation;
#[cfg(target_arch = "x86_64")]
use super::vector;
use crate::element::Element;
use crate::math::{exp, normal_cdf, sigmoid};
#[cfg(target_arch = "x86_64")]
use crate::simd::Isa;
use crate::simd::{fma, simd_fn};
use crate::view::{Output, rows_per_task};

/// Elements per task of the plain activations.
const CHUNK: usize = 16_384;

pub(super) fn gated<E: Element>(gate_up: &[E], width: usize, act: Activation, y: &mut Output<E>) {
    if width == 0 {
        return;
    }
    let rows = rows_per_task(width);
    y.chunks(rows * width).zip(gate_up.par_chunks(rows * 2 * width)).for_each(|(y, gate_up)| {
        for (y, row) in y.chunks_exact_mut(width).zip(gate_up.chunks_exact(2 * width)) {
            let (gate, up) = row.split_at(width);
            #[cfg(target_arch = "x86_64")]
            if has_vectors::<E>(act) {
                // SAFETY: AVX-512 is active.
                unsafe { vector::gated_row(gate, up, y) };
                continue;
            }
            gated_row(gate, up, act, y);
        }
    });
}

pub(super) fn gated_backward<E: Element>(dy: &[E], gate_up: &[E], width: usize, act: Activation, dx: &mut Output<E>) {
    if width == 0 {
        return;
    }
    let rows = rows_per_task(width);
    let inputs = dy.par_chunks(rows * width).zip(gate_up.par_chunks(rows * 2 * width));
    dx.chunks(rows * 2 * width).zip(inputs).for_each(|(dx, (dy, gate_up))| {
        let inputs = dy.chunks_exact(width).zip(gate_up.chunks_exact(2 * width));
        for (dx, (dy, row)) in dx.chunks_exact_mut(2 * width).zip(inputs) {
            let (gate, up) = row.split_at(width);
            let (dgate, dup) = dx.split_at_mut(width);
            #[cfg(target_arch = "x86_64")]
            if has_vectors::<E>(act) {
                // SAFETY: AVX-512 is active.
                unsafe { vector::gated_backward_row::<E, false>(dy, gate, up, dgate, dup, &mut []) };
                continue;
            }
            gated_backward_row(dy, gate, up, act, dgate, dup);
        }
    });
}

pub(super) fn gated_backward_again<E: Element>(
    dy: &[E],
    gate_up: &[E],
    width: usize,
    act: Activation,
    dx: &mut Output<E>,
    y: &mut Output<E>,
) {
    if width == 0 {
        return;
    }
    let rows = rows_per_task(width);
    let inputs = dy.par_chunks(rows * width).zip(gate_up.par_chunks(rows * 2 * width));
    let outputs = dx.chunks(rows * 2 * width).zip(y.chunks(rows * width));
    outputs.zip(inputs).for_each(|((dx, y), (dy, gate_up))| {
        let inputs = dy.chunks_exact(width).zip(gate_up.chunks_exact(2 * width));
        let outputs = dx.chunks_exact_mut(2 * width).zip(y.chunks_exact_mut(width));
        for ((dx, y), (dy, row)) in outputs.zip(inputs) {
            let (gate, up) = row.split_at(width);
            let (dgate, dup) = dx.split_at_mut(width);
            #[cfg(target_arch = "x86_64")]
            if has_vectors::<E>(act) {
                // SAFETY: AVX-512 is active.
                unsafe { vector::gated_backward_row::<E, true>(dy, gate, up, dgate, dup, y) };
                continue;
            }
            gated_backward_again_row(dy, gate, up, act, dgate, dup, y);
        }
    });
}

pub(super) fn activation<E: Element>(x: &[E], act: Activation, y: &mut Output<E>) {
    y.chunks(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(y, x)| plain(x, act, y));
}

pub(super) fn activation_backward<E: Element>(dy: &[E], x: &[E], act: Activation, dx: &mut Output<E>) {
    let inputs = dy.par_chunks(CHUNK).zip(x.par_chunks(CHUNK));
    dx.chunks(CHUNK).zip(inputs).for_each(|(dx, (dy, x))| plain_backward(dy, x, act, dx));
}

/// Whether [`vector`] has the gated activation; of f32 it would wait for memory anyhow.
#[cfg(target_arch = "x86_64")]
fn has_vectors<E: Element>(act: Activation) -> bool {
    E::DTYPE == DType::BF16 && act == Activation::Silu && Isa::active() >= Isa::Avx512
}

/// Value and derivative at `x`.
#[inline(always)]
fn silu<const FMA: bool>(x: f32) -> (f32, f32) {
    let (s, rest) = sigmoid::<FMA>(x);
    (x * s, s * fma::<FMA>(x, rest, 1.0))
}

/// Value and derivative at `x`.
#[inline(always)]
fn gelu_tanh<const FMA: bool>(x: f32) -> (f32, f32) {
    // x/2 (1 + tanh u) = x σ(2u), with 2u = x (A + B x²).
    const A: f32 = 1.595_769; // 2 √(2/π)
    const B: f32 = 0.071_354_814; // 0.044715 A
    let square = x * x;
    let (s, rest) = sigmoid::<FMA>(x * fma::<FMA>(B, square, A));
    let slope = fma::<FMA>(3.0 * B, square, A);
    (x * s, fma::<FMA>(x * s * rest, slope, s))
}

/// Value and derivative at `x`.
#[inline(always)]
fn gelu_erf<const FMA: bool>(x: f32) -> (f32, f32) {
    const DENSITY_AT_ZERO: f32 = 0.398_942_3; // 1 / √(2π)
    let cdf = normal_cdf::<FMA>(x);
    let density = DENSITY_AT_ZERO * exp::<FMA>(-0.5 * (x * x));
    (x * cdf, fma::<FMA>(x, density, cdf))
}

/// Value and derivative at `x`.
#[inline(always)]
fn relu(x: f32) -> (f32, f32) {
    // `x < 0` rather than `x > 0`, so that NaN passes.
    (if x < 0.0 { 0.0 } else { x }, if x > 0.0 { 1.0 } else { 0.0 })
}

/// Runs `$loop` once, compiled for the activation `$act`, with `$f` naming the activation.
macro_rules! for_activation {
    ($act:expr, $f:ident => $loop:block) => {
        match $act {
            Activation::Silu => {
                let $f = silu::<FMA>;
                $loop
            }
            Activation::GeluTanh => {
                let $f = gelu_tanh::<FMA>;
                $loop
            }
            Activation::GeluErf => {
                let $f = gelu_erf::<FMA>;
                $loop
            }
            Activation::Relu => {
                let $f = relu;
                $loop
            }
        }
    };
}

simd_fn! {
    fn gated_row<E: Element>(gate: &[E], up: &[E], act: Activation, y: &mut [E]) = gated_row_body;
}

#[inline(always)]
fn gated_row_body<E: Element, const FMA: bool>(gate: &[E], up: &[E], act: Activation, y: &mut [E]) {
    for_activation!(act, f => {
        for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
            *y = E::narrow(f(gate.wide()).0 * up.wide());
        }
    });
}

simd_fn! {
    fn gated_backward_row<E: Element>(dy: &[E], gate: &[E], up: &[E], act: Activation, dgate: &mut [E], dup: &mut [E])
        = gated_backward_row_body;
}

#[inline(always)]
fn gated_backward_row_body<E: Element, const FMA: bool>(
    dy: &[E],
    gate: &[E],
    up: &[E],
    act: Activation,
    dgate: &mut [E],
    dup: &mut [E],
) {
    for_activation!(act, f => {
        let inputs = dy.iter().zip(gate).zip(up);
        for ((dgate, dup), ((dy, gate), up)) in dgate.iter_mut().zip(dup).zip(inputs) {
            let ((value, slope), dy) = (f(gate.wide()), dy.wide());
            *dgate = E::narrow(dy * up.wide() * slope);
            *dup = E::narrow(dy * value);
        }
    });
}

simd_fn! {
    fn gated_backward_again_row<E: Element>(
        dy: &[E], gate: &[E], up: &[E], act: Activation, dgate: &mut [E], dup: &mut [E], y: &mut [E]
    ) = gated_backward_again_row_body;
}

#[inline(always)]
fn gated_backward_again_row_body<E: Element, const FMA: bool>(
    dy: &[E],
    gate: &[E],
    up: &[E],
    act: Activation,
    dgate: &mut [E],
    dup: &mut [E],
    y: &mut [E],
) {
    for_activation!(act, f => {
        let (inputs, outputs) = (dy.iter().zip(gate).zip(up), dgate.iter_mut().zip(dup).zip(y));
        for (((dgate, dup), y), ((dy, gate), up)) in outputs.zip(inputs) {
            let ((value, slope), dy, up) = (f(gate.wide()), dy.wide(), up.wide());
            *dgate = E::narrow(dy * up * slope);
            *dup = E::narrow(dy * value);
            *y = E::narrow(value * up);
        }
    });
}

simd_fn! {
    fn plain<E: Element>(x: &[E], act: Activation, y: &mut [E]) = plain_body;
}

#[inline(always)]
fn plain_body<E: Element, const FMA: bool>(x: &[E], act: Activation, y: &mut [E]) {
    for_activation!(act, f => {
        for (y, x) in y.iter_mut().zip(x) {
            *y = E::narrow(f(x.wide()).0);
        }
    });
}

simd_fn! {
    fn plain_backward<E: Element>(dy: &[E], x: &[E], act: Activation, dx: &mut [E]) = plain_backward_body;
}

#[inline(always)]
fn plain_backward_body<E: Element, const FMA: bool>(dy: &[E], x: &[E], act: Activation, dx: &mut [E]) {
    for_activation!(act, f => {
        for ((dx, dy), x) in dx.iter_mut().zip(dy).zip(x) {
            *dx = E::narrow(dy.wide() * f(x.wide()).1);
        }
    });
}
