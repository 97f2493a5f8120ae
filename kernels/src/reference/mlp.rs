//! Twins of the activations.

use crate::mlp::Activation;

/// Standard normal distribution function by the series of erf near zero and the continued fraction of erfc beyond
/// (Abramowitz and Stegun 7.1.6 and 7.1.14).
pub fn normal_cdf(x: f64) -> f64 {
    let z = x.abs() * std::f64::consts::FRAC_1_SQRT_2;
    let root_pi = std::f64::consts::PI.sqrt();
    let scale = (-z * z).exp() / root_pi;
    let tail = if z < 2.5 {
        let (mut term, mut series, mut n) = (z, z, 0.0);
        while term > 1e-18 * series {
            n += 1.0;
            term *= 2.0 * z * z / (2.0 * n + 1.0);
            series += term;
        }
        0.5 - scale * series
    } else {
        let fraction = (1..=200).rev().fold(0.0, |fraction, k| k as f64 / 2.0 / (z + fraction));
        0.5 * scale / (z + fraction)
    };
    if x < 0.0 { tail } else { 1.0 - tail }
}

/// `act(x)`.
pub fn activation(x: f64, act: Activation) -> f64 {
    match act {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            0.5 * x * (1.0 + u.tanh())
        }
        Activation::GeluErf => x * normal_cdf(x),
        Activation::Relu => x.max(0.0),
    }
}
