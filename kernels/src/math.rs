//! Elementary functions that vectorise, and sums whose order is fixed.
//!
//! Everything here is branch-free (selects only), calls no C library and is always inlined, so that a loop over it inside
//! a [`crate::simd::simd_fn`] body becomes vector code. `FMA` says whether the instruction set has a fused multiply-add; with
//! it, all instruction sets give the same bits. NaN goes in, NaN comes out.
//!
//! Polynomials: S. Moshier, *Cephes Mathematical Library*, single precision (`expf`, `logf`, `ndtrf`).
//! Errors relative to f64 are measured by the tests below.

use crate::simd::fma;

/// Lanes of every fixed-order sum: one AVX-512 register, two AVX2 registers.
pub(crate) const LANES: usize = 16;

/// `c[0] x^(n-1) + … + c[n-1]` by Horner's rule.
#[inline(always)]
fn polynomial<const FMA: bool, const N: usize>(x: f32, coefficients: [f32; N]) -> f32 {
    let mut y = coefficients[0];
    for c in &coefficients[1..] {
        y = fma::<FMA>(y, x, *c);
    }
    y
}

/// -124 ln 2: no intermediate of [`exp`] is subnormal, which would cost a hundred times a multiplication.
const LOWEST: f32 = -85.950_25;
/// 1.5 · 2²³: adding it rounds to an integer and leaves it in the low bits.
const ROUND: f32 = 12_582_912.0;
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;
/// (e^r − 1 − r) / r² for |r| ≤ ln 2 / 2.
const EXPONENTIAL: [f32; 6] = [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1];

/// `e^x`, relative error below 1.5e-7; results below 2^-124 are flushed to zero.
#[inline(always)]
pub(crate) fn exp<const FMA: bool>(x: f32) -> f32 {
    const HIGHEST: f32 = 88.722_83; // ln of the largest f32
    // Comparisons instead of `clamp`, so that NaN passes.
    let low = x < LOWEST;
    let high = x > HIGHEST;
    let y = if low { LOWEST } else { x };
    let y = if high { HIGHEST } else { y };
    let rounded = fma::<FMA>(y, std::f32::consts::LOG2_E, ROUND);
    let n = rounded - ROUND;
    let r = fma::<FMA>(n, -LN2_HIGH, y);
    let r = fma::<FMA>(n, -LN2_LOW, r);
    let p = polynomial::<FMA, 6>(r, EXPONENTIAL);
    let p = fma::<FMA>(p, r * r, r) + 1.0;
    // n is in -124..=128 and 2^128 is not a float: scale by 2^(n-1), then by 2.
    let scale = f32::from_bits(rounded.to_bits().wrapping_add(126) << 23);
    let e = p * scale * 2.0;
    let e = if low { 0.0 } else { e };
    if high { f32::INFINITY } else { e }
}

/// The bits of [`exp`] in fewer steps, for `x` up to 80.
#[inline(always)]
pub(crate) fn exp_small<const FMA: bool>(x: f32) -> f32 {
    let low = x < LOWEST;
    let y = if low { LOWEST } else { x };
    let rounded = fma::<FMA>(y, std::f32::consts::LOG2_E, ROUND);
    let n = rounded - ROUND;
    let r = fma::<FMA>(n, -LN2_HIGH, y);
    let r = fma::<FMA>(n, -LN2_LOW, r);
    let p = polynomial::<FMA, 6>(r, EXPONENTIAL);
    let p = fma::<FMA>(p, r * r, r) + 1.0;
    // n is in -124..=116: 2^n is a normal number, and a product by it exact, in one step or two.
    let e = p * f32::from_bits(rounded.to_bits().wrapping_add(127) << 23);
    if low { 0.0 } else { e }
}

/// Natural logarithm of a positive normal number, relative error below 2e-7.
///
/// Zero gives `-inf`, infinity gives infinity; negative numbers give NaN.
#[inline(always)]
pub(crate) fn ln<const FMA: bool>(x: f32) -> f32 {
    // x = 2^e * m with m in [sqrt(1/2), sqrt(2)).
    const SQRT_HALF_BITS: u32 = 0x3f35_04f3;
    let shifted = x.to_bits().wrapping_sub(SQRT_HALF_BITS);
    let e = ((shifted as i32) >> 23) as f32;
    let m = f32::from_bits((shifted & 0x007f_ffff).wrapping_add(SQRT_HALF_BITS));
    let r = m - 1.0;
    let z = r * r;
    let p = polynomial::<FMA, 9>(
        r,
        [
            7.037_683_6e-2,
            -1.151_461e-1,
            1.167_699_84e-1,
            -1.242_014_1e-1,
            1.424_932_3e-1,
            -1.666_805_8e-1,
            2.000_071_5e-1,
            -2.499_999_4e-1,
            3.333_333e-1,
        ],
    );
    let y = fma::<FMA>(p * r, z, e * -2.121_944_4e-4);
    let y = fma::<FMA>(z, -0.5, y) + r;
    let y = fma::<FMA>(e, 0.693_359_4, y);
    let y = if x == f32::INFINITY { x } else { y };
    let y = if x >= 0.0 { y } else { f32::NAN };
    if x == 0.0 { f32::NEG_INFINITY } else { y }
}

/// Logistic function `σ(x) = 1 / (1 + e^-x)` and `1 - σ(x)`, relative error below 3e-7 each for `|x| < 80`.
///
/// Beyond, the small one of the two stays at about `e^-80`.
#[inline(always)]
pub(crate) fn sigmoid<const FMA: bool>(x: f32) -> (f32, f32) {
    // Clamped so that e^-x stays finite; comparisons, so that NaN passes.
    let x = if x < -80.0 { -80.0 } else { x };
    let e = exp_small::<FMA>(-x);
    let s = 1.0 / (1.0 + e);
    (s, e * s)
}

/// Error function for `|x| <= 1`.
#[inline(always)]
fn erf_near<const FMA: bool>(x: f32) -> f32 {
    let p = polynomial::<FMA, 7>(
        x * x,
        [
            7.853_861_4e-5,
            -8.010_193_6e-4,
            5.188_327_7e-3,
            -2.685_381_2e-2,
            1.128_358_5e-1,
            -3.761_262_6e-1,
            std::f32::consts::FRAC_2_SQRT_PI,
        ],
    );
    x * p
}

/// `erfc(x) e^(x²)` for `x >= 1`.
#[inline(always)]
fn scaled_erfc_far<const FMA: bool>(x: f32) -> f32 {
    let inverse = 1.0 / x;
    let y = inverse * inverse;
    let middle = polynomial::<FMA, 9>(
        y,
        [
            2.326_82e-2,
            -1.387_039_4e-1,
            3.687_424_7e-1,
            -5.824_733e-1,
            6.210_004_6e-1,
            -4.944_515_3e-1,
            3.404_88e-1,
            -2.741_127e-1,
            5.638_259_4e-1,
        ],
    );
    let tail = polynomial::<FMA, 8>(
        y,
        [
            -1.047_766_4e1,
            1.297_72e1,
            -7.495_518_7,
            2.921_019,
            -1.015_265_3,
            4.218_463_4e-1,
            -2.820_767_4e-1,
            5.641_895e-1,
        ],
    );
    let p = if x < 2.0 { middle } else { tail };
    inverse * p
}

/// Standard normal distribution function, the gate of the exact GELU: relative error below 1e-6 on both sides.
#[inline(always)]
pub(crate) fn normal_cdf<const FMA: bool>(x: f32) -> f32 {
    // Beyond 20 the tail is zero; clamping keeps x² finite. Comparisons, so that NaN passes.
    let x = if x > 20.0 { 20.0 } else { x };
    let x = if x < -20.0 { -20.0 } else { x };
    let z = x * std::f32::consts::FRAC_1_SQRT_2;
    let near = fma::<FMA>(0.5, erf_near::<FMA>(z), 0.5);
    // e^(-x²/2), with the rounding error of x² put back: it would cost digits as x grows.
    let square = x * x;
    let error = if FMA { fma::<FMA>(x, x, -square) } else { 0.0 };
    let e = exp::<FMA>(-0.5 * square);
    let e = fma::<FMA>(e, -0.5 * error, e);
    let tail = 0.5 * e * scaled_erfc_far::<FMA>(z.abs());
    let far = if x < 0.0 { tail } else { 1.0 - tail };
    if z.abs() < 1.0 { near } else { far }
}

/// Joins sixteen lanes as a balanced tree, 16 → 8 → 4 → 2 → 1, lower lane on the left.
#[inline(always)]
fn join_lanes(lanes: [f32; LANES], join: impl Fn(f32, f32) -> f32) -> f32 {
    let eight: [f32; 8] = std::array::from_fn(|i| join(lanes[i], lanes[i + 8]));
    let four: [f32; 4] = std::array::from_fn(|i| join(eight[i], eight[i + 4]));
    join(join(four[0], four[2]), join(four[1], four[3]))
}

/// The larger of the two, `a` if `b` is NaN: the order of arguments of the vector instruction.
#[inline(always)]
pub(crate) fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// The sum of sixteen lanes as a balanced tree: 16 → 8 → 4 → 2 → 1.
#[inline(always)]
pub(crate) fn sum_lanes(lanes: [f32; LANES]) -> f32 {
    join_lanes(lanes, |a, b| a + b)
}

/// The largest of sixteen lanes. NaN is passed over.
#[inline(always)]
pub(crate) fn max_lanes(lanes: [f32; LANES]) -> f32 {
    join_lanes(lanes, larger)
}

/// Fewer than sixteen elements, with `fill` beyond the end.
#[inline(always)]
fn chunk_or(rest: &[f32], fill: f32) -> [f32; LANES] {
    let mut chunk = [fill; LANES];
    chunk[..rest.len()].copy_from_slice(rest);
    chunk
}

/// Sum of `x`: element `i` goes to lane `i % 16` in order of `i`, then [`sum_lanes`].
#[inline(always)]
pub(crate) fn sum(x: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    let mut add = |chunk: &[f32; LANES]| {
        for lane in 0..LANES {
            lanes[lane] += chunk[lane];
        }
    };
    let (chunks, rest) = x.as_chunks::<LANES>();
    chunks.iter().for_each(&mut add);
    if !rest.is_empty() {
        add(&chunk_or(rest, 0.0));
    }
    sum_lanes(lanes)
}

/// `Σ a_i b_i` over the shorter of the two: product `i` goes to lane `i % 16` in order of `i`, then [`sum_lanes`].
#[inline(always)]
pub(crate) fn dot<const FMA: bool>(a: &[f32], b: &[f32]) -> f32 {
    let n = a.len().min(b.len());
    let ((a, rest_a), (b, rest_b)) = (a[..n].as_chunks::<LANES>(), b[..n].as_chunks::<LANES>());
    let mut lanes = [0.0; LANES];
    let mut add = |a: &[f32; LANES], b: &[f32; LANES]| {
        for lane in 0..LANES {
            lanes[lane] = fma::<FMA>(a[lane], b[lane], lanes[lane]);
        }
    };
    for (a, b) in a.iter().zip(b) {
        add(a, b);
    }
    if !rest_a.is_empty() {
        add(&chunk_or(rest_a, 0.0), &chunk_or(rest_b, 0.0));
    }
    sum_lanes(lanes)
}

/// Largest element; `-inf` for none. NaN is passed over: whoever must see it looks for it.
#[inline(always)]
pub(crate) fn max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let mut include = |chunk: &[f32; LANES]| {
        for lane in 0..LANES {
            lanes[lane] = larger(lanes[lane], chunk[lane]);
        }
    };
    let (chunks, rest) = x.as_chunks::<LANES>();
    chunks.iter().for_each(&mut include);
    if !rest.is_empty() {
        include(&chunk_or(rest, f32::NEG_INFINITY));
    }
    max_lanes(lanes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Largest relative error of `f` against `exact` over `n` points of `[from, to]`.
    fn worst(from: f32, to: f32, f: impl Fn(f32) -> f32, exact: impl Fn(f64) -> f64) -> f64 {
        let n = 400_000;
        (0..=n)
            .map(|i| {
                let x = from + (to - from) * (i as f32 / n as f32);
                let want = exact(x as f64);
                if want == 0.0 { f(x).abs() as f64 } else { ((f(x) as f64 - want) / want).abs() }
            })
            .fold(0.0, f64::max)
    }

    fn check<const FMA: bool>() {
        assert!(worst(-85.9, 88.7, exp::<FMA>, f64::exp) < 1.5e-7);
        assert!(worst(-1.0, 1.0, exp::<FMA>, f64::exp) < 1.5e-7);
        assert!(worst(1e-6, 4.0, ln::<FMA>, f64::ln) < 2e-7);
        assert!(worst(1.0, 1e30, ln::<FMA>, f64::ln) < 2e-7);
        let twin = |x: f64| 1.0 / (1.0 + (-x).exp());
        assert!(worst(-80.0, 80.0, |x| sigmoid::<FMA>(x).0, twin) < 3e-7);
        assert!(worst(-80.0, 80.0, |x| sigmoid::<FMA>(x).1, |x| twin(-x)) < 3e-7);
        let twin = crate::reference::normal_cdf;
        assert!(worst(-5.0, 9.0, normal_cdf::<FMA>, twin) < 1e-6);
    }

    #[test]
    fn functions_match_f64() {
        check::<true>();
    }

    #[test]
    fn shorter_exponential_has_the_same_bits() {
        for i in 0..=700_000u32 {
            let x = i as f32 * -2.5e-4 + 80.0;
            assert_eq!(exp_small::<true>(x).to_bits(), exp::<true>(x).to_bits(), "{x}");
            assert_eq!(exp_small::<false>(x).to_bits(), exp::<false>(x).to_bits(), "{x}");
        }
        assert_eq!(exp_small::<true>(f32::NEG_INFINITY), 0.0);
        assert!(exp_small::<true>(f32::NAN).is_nan());
    }

    #[test]
    fn functions_match_f64_without_fma() {
        // Two roundings in the range reductions: the bounds above still hold except for the far tail of the normal.
        assert!(worst(-85.9, 88.7, exp::<false>, f64::exp) < 2e-7);
        assert!(worst(1e-6, 4.0, ln::<false>, f64::ln) < 2e-7);
        assert!(worst(-5.0, 9.0, normal_cdf::<false>, crate::reference::normal_cdf) < 5e-6);
    }

    #[test]
    fn limits_and_nan() {
        assert_eq!(exp::<true>(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp::<true>(-200.0), 0.0);
        assert_eq!(exp::<true>(0.0), 1.0);
        assert_eq!(exp::<true>(89.0), f32::INFINITY);
        assert_eq!(ln::<true>(1.0), 0.0);
        assert_eq!(ln::<true>(0.0), f32::NEG_INFINITY);
        assert_eq!(ln::<true>(f32::INFINITY), f32::INFINITY);
        assert!(ln::<true>(-1.0).is_nan());
        assert!(sigmoid::<true>(f32::NEG_INFINITY).0 < 1e-34);
        assert_eq!(sigmoid::<true>(f32::INFINITY), (1.0, 0.0));
        assert_eq!(normal_cdf::<true>(1e30), 1.0);
        assert_eq!(normal_cdf::<true>(f32::NEG_INFINITY), 0.0);
        for f in [exp::<true>, ln::<true>, |x| sigmoid::<true>(x).0, normal_cdf::<true>] {
            assert!(f(f32::NAN).is_nan());
        }
    }

    #[test]
    fn sums_have_the_documented_order() {
        let x: Vec<f32> = (0..37).map(|i| ((i * 7919) % 101) as f32 * 1.37e-3 - 0.05).collect();
        let mut lanes = [0f32; LANES];
        for (i, v) in x.iter().enumerate() {
            lanes[i % LANES] += v;
        }
        for width in [8, 4, 2, 1] {
            for i in 0..width {
                lanes[i] += lanes[i + width];
            }
        }
        assert_eq!(sum(&x).to_bits(), lanes[0].to_bits());
        assert_eq!(max(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        assert_eq!(max(&[]), f32::NEG_INFINITY);
        let exact: f64 = x.iter().map(|v| (*v as f64).powi(2)).sum();
        assert!(((dot::<true>(&x, &x) as f64 - exact) / exact).abs() < 1e-6);
    }
}
