//! The update loops: parallel over fixed chunks, element by element independent.

use rayon::prelude::*;

use super::AdamWConfig;
use crate::simd::{fma, simd_fn};

/// Elements that one task updates: four streams of this length stay in the first-level cache's reach.
const CHUNK: usize = 16 * 1024;

/// Everything that is the same for all elements of a step, computed once in f64.
pub(super) struct Factors {
    grad_scale: f32,
    keep: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    /// lr / (1 − β₁ᵗ).
    step_size: f32,
    /// 1 / √(1 − β₂ᵗ).
    root_correction: f32,
    eps: f32,
}

impl Factors {
    pub(super) fn new(lr: f64, weight_decay: f64, step: u64, grad_scale: f32, config: &AdamWConfig) -> Self {
        let AdamWConfig { beta1, beta2, eps } = *config;
        let step = step as f64;
        Self {
            grad_scale,
            keep: (1.0 - lr * weight_decay) as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            step_size: (lr / (1.0 - beta1.powf(step))) as f32,
            root_correction: (1.0 / (1.0 - beta2.powf(step)).sqrt()) as f32,
            eps: eps as f32,
        }
    }
}

pub(super) fn adamw(param: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32], factors: &Factors) {
    param
        .par_chunks_mut(CHUNK)
        .zip(grad.par_chunks(CHUNK))
        .zip(m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK)))
        .for_each(|((param, grad), (m, v))| adamw_chunk(param, grad, m, v, factors));
}

pub(super) fn ema(target: &mut [f32], source: &[f32], rate: f32) {
    target
        .par_chunks_mut(CHUNK)
        .zip(source.par_chunks(CHUNK))
        .for_each(|(target, source)| ema_chunk(target, source, rate));
}

/// `p ← p · (1 − lr · weight_decay) − lr · sign`.
pub(super) fn sign_sgd(param: &mut [f32], sign: &[f32], lr: f64, weight_decay: f64) {
    let (keep, lr) = ((1.0 - lr * weight_decay) as f32, lr as f32);
    let tasks = param.par_chunks_mut(CHUNK).zip(sign.par_chunks(CHUNK));
    tasks.for_each(|(param, sign)| sign_sgd_chunk(param, sign, keep, lr));
}

/// `m ← m + (1 − β₁)(grad · scale − m)`.
pub(super) fn momentum(m: &mut [f32], grad: &[f32], beta1: f64, scale: f32) {
    let rate = (1.0 - beta1) as f32;
    let tasks = m.par_chunks_mut(CHUNK).zip(grad.par_chunks(CHUNK));
    tasks.for_each(|(m, grad)| momentum_chunk(m, grad, rate, scale));
}

/// `v ← β₂ v + (1 − β₂)(grad · scale)²`.
pub(super) fn variance(v: &mut [f32], grad: &[f32], beta2: f64, scale: f32) {
    let (beta2, rate) = (beta2 as f32, (1.0 - beta2) as f32);
    let tasks = v.par_chunks_mut(CHUNK).zip(grad.par_chunks(CHUNK));
    tasks.for_each(|(v, grad)| variance_chunk(v, grad, beta2, rate, scale));
}

/// `p ← p · (1 − lr · weight_decay) − lr · m / (√v + eps)`.
pub(super) fn apply(param: &mut [f32], m: &[f32], v: &[f32], lr: f64, eps: f64, weight_decay: f64) {
    let (keep, lr, eps) = ((1.0 - lr * weight_decay) as f32, lr as f32, eps as f32);
    let tasks = param.par_chunks_mut(CHUNK).zip(m.par_chunks(CHUNK).zip(v.par_chunks(CHUNK)));
    tasks.for_each(|(param, (m, v))| apply_chunk(param, m, v, keep, lr, eps));
}

simd_fn! {
    fn adamw_chunk(param: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32], factors: &Factors) = adamw_body;
}
simd_fn! { fn ema_chunk(target: &mut [f32], source: &[f32], rate: f32) = ema_body; }
simd_fn! { fn sign_sgd_chunk(param: &mut [f32], sign: &[f32], keep: f32, lr: f32) = sign_sgd_body; }
simd_fn! { fn momentum_chunk(m: &mut [f32], grad: &[f32], rate: f32, scale: f32) = momentum_body; }
simd_fn! { fn variance_chunk(v: &mut [f32], grad: &[f32], beta2: f32, rate: f32, scale: f32) = variance_body; }
simd_fn! { fn apply_chunk(param: &mut [f32], m: &[f32], v: &[f32], keep: f32, lr: f32, eps: f32) = apply_body; }

#[inline(always)]
fn adamw_body<const FMA: bool>(param: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32], factors: &Factors) {
    for (((param, &grad), m), v) in param.iter_mut().zip(grad).zip(m).zip(v) {
        let grad = grad * factors.grad_scale;
        *m = fma::<FMA>(factors.one_minus_beta1, grad - *m, *m);
        *v = fma::<FMA>(factors.beta2, *v, factors.one_minus_beta2 * grad * grad);
        let denominator = fma::<FMA>(v.sqrt(), factors.root_correction, factors.eps);
        *param = fma::<FMA>(-factors.step_size, *m / denominator, *param * factors.keep);
    }
}

#[inline(always)]
fn ema_body<const FMA: bool>(target: &mut [f32], source: &[f32], rate: f32) {
    for (target, &source) in target.iter_mut().zip(source) {
        *target = fma::<FMA>(rate, source - *target, *target);
    }
}

#[inline(always)]
fn sign_sgd_body<const FMA: bool>(param: &mut [f32], sign: &[f32], keep: f32, lr: f32) {
    for (param, &sign) in param.iter_mut().zip(sign) {
        *param = fma::<FMA>(-lr, sign, *param * keep);
    }
}

#[inline(always)]
fn momentum_body<const FMA: bool>(m: &mut [f32], grad: &[f32], rate: f32, scale: f32) {
    for (m, &grad) in m.iter_mut().zip(grad) {
        *m = fma::<FMA>(rate, grad * scale - *m, *m);
    }
}

#[inline(always)]
fn variance_body<const FMA: bool>(v: &mut [f32], grad: &[f32], beta2: f32, rate: f32, scale: f32) {
    for (v, &grad) in v.iter_mut().zip(grad) {
        let grad = grad * scale;
        *v = fma::<FMA>(beta2, *v, rate * grad * grad);
    }
}

#[inline(always)]
fn apply_body<const FMA: bool>(param: &mut [f32], m: &[f32], v: &[f32], keep: f32, lr: f32, eps: f32) {
    for ((param, &m), &v) in param.iter_mut().zip(m).zip(v) {
        *param = fma::<FMA>(-lr, m / (v.sqrt() + eps), *param * keep);
    }
}
