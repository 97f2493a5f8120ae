//! What the kernel tests share: addressed test values, comparisons, thread pools.
#![allow(dead_code, reason = "each test binary uses some of it")]

use candle_core::{Device, Tensor};

/// `n` values in (-1, 1), different for every `seed` (splitmix64, so that a failure can be repeated).
pub(crate) fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    (0..n).map(|_| (next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0).collect()
}

pub(crate) fn tensor(values: &[f32], shape: &[usize]) -> Tensor {
    Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
}

/// A tensor of [`values`].
pub(crate) fn random(shape: &[usize], seed: u64) -> Tensor {
    tensor(&values(shape.iter().product(), seed), shape)
}

pub(crate) fn zeros(shape: &[usize]) -> Tensor {
    Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu).unwrap()
}

pub(crate) fn flat(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

pub(crate) fn rows(t: &Tensor) -> Vec<Vec<f32>> {
    t.to_vec2().unwrap()
}

pub(crate) fn bits(t: &Tensor) -> Vec<u32> {
    flat(t).iter().map(|v| v.to_bits()).collect()
}

pub(crate) fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&v| v as f64).collect()
}

/// Every element within `tolerance` times the largest magnitude in `want`, or times 1, the size of the inputs.
pub(crate) fn assert_close(got: &[f32], want: &[f64], tolerance: f64, what: &str) {
    assert_within(got, want, tolerance * want.iter().fold(1.0, |m: f64, v| m.max(v.abs())), what);
}

/// Every element within `bound` of `want`.
pub(crate) fn assert_within(got: &[f32], want: &[f64], bound: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let error = (*g as f64 - w).abs();
        assert!(error <= bound, "{what}[{i}]: got {g}, want {w} (error {error:.2e}, bound {bound:.2e})");
    }
}

/// Runs `f` in a pool of `threads` threads.
pub(crate) fn with_threads<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(f)
}

/// Central differences of `f` at `x`, one coordinate at a time.
pub(crate) fn gradient(x: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    const STEP: f64 = 1e-5;
    let mut x = x.to_vec();
    (0..x.len())
        .map(|i| {
            let at = x[i];
            x[i] = at + STEP;
            let up = f(&x);
            x[i] = at - STEP;
            let down = f(&x);
            x[i] = at;
            (up - down) / (2.0 * STEP)
        })
        .collect()
}
