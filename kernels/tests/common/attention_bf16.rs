//! Bf16 attention against its twin on the same (rounded) inputs, element by element with a running error bound.
//!
//! One rounding to bf16 (8 significant bits) changes a number by at most `U` of itself. Rounded are: the probabilities
//! and score gradients as factors of products (matrix tiles only), and every result. Hence, with `|x|` the sums of the
//! magnitudes of the terms:
//!
//! - `|δo| ≤ U Σ p|v| + U|o|`;
//! - the saved `o` enters `D = Σ dO o`, so `|δD| ≤ Σ |dO| |δo|`, and `|δdS| ≤ scale · p · |δD| + U |dS|`;
//! - `|δdq| ≤ Σ |δdS| |k| + U|dq|`, `|δdk| ≤ Σ |δdS| |q| + U|dk|`, `|δdv| ≤ U Σ p|dO| + U|dv|`.
//!
//! Arithmetic in f32 adds `SINGLE` of the same sums; scores of size 10 lose about as much.

use candle_core::{DType, Tensor};
use tandem_kernels::attention::{AttentionSpec, attention, attention_backward};
use tandem_kernels::reference;

use crate::common::{random, rows, wide};

/// Unit roundoff of bf16.
const U: f64 = 1.0 / 256.0;
/// Relative error of sums of products of f32, and of `exp` of scores of size 10, with second-order terms in `U`.
const SINGLE: f64 = 3e-5;

pub(crate) fn to_f32(t: &Tensor) -> Tensor {
    t.to_dtype(DType::F32).unwrap()
}

pub(crate) fn bf16(shape: &[usize], seed: u64) -> Tensor {
    (random(shape, seed) * 2.0).unwrap().to_dtype(DType::BF16).unwrap()
}

pub(crate) fn cuts(lengths: &[usize]) -> Vec<u32> {
    let mut cu = vec![0];
    for len in lengths {
        cu.push(cu[cu.len() - 1] + *len as u32);
    }
    cu
}

type Rows = Vec<Vec<f64>>;

/// Head number `head` (queries, then keys, then values) of rows `from..to`.
fn head(x: &[Vec<f32>], from: usize, to: usize, head: usize, width: usize) -> Rows {
    x[from..to].iter().map(|row| wide(&row[head * width..(head + 1) * width])).collect()
}

fn dot(a: &[f64], b: &[f64], term: impl Fn(f64, f64) -> f64) -> f64 {
    a.iter().zip(b).map(|(a, b)| term(*a, *b)).sum()
}

fn add(into: &mut [f64], factor: f64, from: &[f64]) {
    into.iter_mut().zip(from).for_each(|(into, from)| *into += factor * from.abs());
}

fn zeros(like: &Rows) -> Rows {
    like.iter().map(|row| vec![0.0; row.len()]).collect()
}

/// Error bounds of `o`, `dq`, `dk`, `dv` before their own rounding, the last two added to what is there.
fn bounds(
    [q, k, v, d_o]: [&Rows; 4],
    scale: f64,
    visible: impl Fn(usize, usize) -> bool,
    dk: &mut Rows,
    dv: &mut Rows,
) -> (Rows, Rows) {
    let (want, lse) = reference::attention::attention(q, k, v, scale, &visible);
    let (mut o, mut dq) = (zeros(q), zeros(q));
    for i in 0..q.len() {
        let keys: Vec<usize> = (0..k.len()).filter(|&j| visible(i, j)).collect();
        let p = |j: usize| (scale * dot(&q[i], &k[j], |q, k| q * k) - lse[i]).exp();
        keys.iter().for_each(|&j| add(&mut o[i], (U + SINGLE) * p(j), &v[j]));
        let rounded: Vec<f64> = o[i].iter().zip(&want[i]).map(|(bound, o)| bound + U * o.abs()).collect();
        let delta = dot(&d_o[i], &want[i], |d_o, o| d_o * o);
        let delta_error = dot(&d_o[i], &rounded, |d_o, bound| d_o.abs() * bound);
        for &j in &keys {
            let dp = dot(&d_o[i], &v[j], |d_o, v| d_o * v);
            let size = dot(&d_o[i], &v[j], |d_o, v| (d_o * v).abs()) + delta.abs();
            let error = scale * p(j) * (delta_error + U * (dp - delta).abs() + (SINGLE + U * U) * size);
            add(&mut dq[i], error, &k[j]);
            add(&mut dk[j], error, &q[i]);
            add(&mut dv[j], (U + SINGLE) * p(j), &d_o[i]);
        }
    }
    (o, dq)
}

fn assert_bounded(got: &Rows, want: &Rows, bound: &Rows, what: &str) {
    for (i, ((got, want), bound)) in got.iter().zip(want).zip(bound).enumerate() {
        for (d, ((got, want), bound)) in got.iter().zip(want).zip(bound).enumerate() {
            let (error, bound) = ((got - want).abs(), bound + U * want.abs() + 1e-6);
            assert!(error <= bound, "{what}[{i}, {d}]: got {got}, want {want} (error {error:.2e}, bound {bound:.2e})");
        }
    }
}

/// Output, log-sum-exp and gradient.
pub(crate) fn run(qkv: &Tensor, d_o: &Tensor, cu: &[u32], spec: &AttentionSpec) -> [Tensor; 3] {
    let (o, saved) = attention(qkv, cu, spec).unwrap();
    let dqkv = attention_backward(d_o, qkv, &o, &saved, cu, spec).unwrap();
    [o, saved.lse, dqkv]
}

/// Forward and backward of random sequences of these lengths within their bounds.
pub(crate) fn check(spec: &AttentionSpec, lengths: &[usize]) {
    let cu = cuts(lengths);
    let tokens = cu[lengths.len()] as usize;
    let (qkv, d_o) = (bf16(&[tokens, spec.qkv_width()], 1), bf16(&[tokens, spec.output_width()], 2));
    let [o, lse, dqkv] = run(&qkv, &d_o, &cu, spec);
    assert_eq!((o.dtype(), lse.dtype(), dqkv.dtype()), (DType::BF16, DType::F32, DType::BF16));
    let [qkv, d_o, o, lse, dqkv] = [qkv, d_o, o, lse, dqkv].map(|t| rows(&to_f32(&t)));
    let (h, kv, d, group) = (spec.heads, spec.kv_heads, spec.head_dim, spec.heads / spec.kv_heads);
    let (scale, window) = (spec.scale as f64, spec.window);
    let mask = |i: usize, j: usize| (!spec.causal || j <= i) && window.is_none_or(|window| i < j + window);
    for (n, bounds_of_sequence) in cu.windows(2).enumerate() {
        let (from, to) = (bounds_of_sequence[0] as usize, bounds_of_sequence[1] as usize);
        let part = |x: &[Vec<f32>], number| head(x, from, to, number, d);
        let what = format!("{spec:?} sequence {n} of length {}", to - from);
        for kv_head in 0..kv {
            let (k, v) = (part(&qkv, h + kv_head), part(&qkv, h + kv + kv_head));
            let (mut dk, mut dv, mut dk_bound, mut dv_bound) = (zeros(&k), zeros(&k), zeros(&k), zeros(&k));
            for number in kv_head * group..(kv_head + 1) * group {
                let (q, d_o) = (part(&qkv, number), part(&d_o, number));
                let (want_o, want_lse) = reference::attention::attention(&q, &k, &v, scale, mask);
                let (want_dq, more_dk, more_dv) =
                    reference::attention::attention_backward(&d_o, &q, &k, &v, scale, mask);
                let (o_bound, dq_bound) = bounds([&q, &k, &v, &d_o], scale, mask, &mut dk_bound, &mut dv_bound);
                assert_bounded(&part(&o, number), &want_o, &o_bound, &format!("o {what} head {number}"));
                assert_bounded(&part(&dqkv, number), &want_dq, &dq_bound, &format!("dq {what} head {number}"));
                for (row, want) in lse[from..to].iter().zip(&want_lse) {
                    let error = (row[number] as f64 - want).abs();
                    assert!(error <= 1e-5 * want.abs().max(1.0), "lse {what} head {number}: error {error:.2e}");
                }
                for (sum, more) in dk.iter_mut().zip(more_dk).chain(dv.iter_mut().zip(more_dv)) {
                    sum.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
                }
            }
            assert_bounded(&part(&dqkv, h + kv_head), &dk, &dk_bound, &format!("dk {what} head {kv_head}"));
            assert_bounded(&part(&dqkv, h + kv + kv_head), &dv, &dv_bound, &format!("dv {what} head {kv_head}"));
        }
    }
}
