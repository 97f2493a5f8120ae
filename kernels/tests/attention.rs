//! Attention against its twin: values, gradients, batch and thread invariance.

mod common;

use candle_core::Tensor;
use common::{assert_close, bits, gradient, random, rows, tensor, wide, with_threads};
use tandem_kernels::attention::{AttentionSpec, attention, attention_backward};
use tandem_kernels::{Error, reference};

/// Lengths around the block size, and short ones.
const LENGTHS: [usize; 7] = [1, 2, 63, 64, 65, 130, 7];

fn spec(heads: usize, kv_heads: usize, head_dim: usize, causal: bool, window: Option<usize>) -> AttentionSpec {
    AttentionSpec { heads, kv_heads, head_dim, causal, window, scale: 1.0 / (head_dim as f32).sqrt() }
}

/// Every mask and grouping, with head widths that are and are not whole vectors.
fn specs() -> Vec<AttentionSpec> {
    vec![
        spec(2, 2, 16, true, None),
        spec(4, 2, 20, true, None),
        spec(3, 1, 32, false, None),
        spec(2, 1, 64, true, Some(17)),
        spec(2, 2, 80, true, Some(64)),
        spec(1, 1, 128, true, Some(100)),
        spec(1, 1, 1, true, None),
        spec(5, 1, 8, true, Some(1)),
    ]
}

fn cuts(lengths: &[usize]) -> Vec<u32> {
    let mut cu = vec![0];
    for len in lengths {
        cu.push(cu[cu.len() - 1] + *len as u32);
    }
    cu
}

fn visible(spec: &AttentionSpec, i: usize, j: usize) -> bool {
    (!spec.causal || j <= i) && spec.window.is_none_or(|window| i < j + window)
}

/// Head number `head` (queries, then keys, then values) of rows `from..to`.
fn head(x: &[Vec<f32>], from: usize, to: usize, head: usize, width: usize) -> Vec<Vec<f64>> {
    x[from..to].iter().map(|row| wide(&row[head * width..(head + 1) * width])).collect()
}

fn narrow(x: &[Vec<f64>]) -> Vec<f32> {
    x.iter().flatten().map(|v| *v as f32).collect()
}

fn check(spec: &AttentionSpec, lengths: &[usize]) {
    let cu = cuts(lengths);
    let tokens = cu[lengths.len()] as usize;
    let qkv = (random(&[tokens, spec.qkv_width()], 1) * 2.0).unwrap();
    let d_o = random(&[tokens, spec.output_width()], 2);
    let (o, saved) = attention(&qkv, &cu, spec).unwrap();
    let dqkv = rows(&attention_backward(&d_o, &qkv, &o, &saved, &cu, spec).unwrap());
    let (qkv, o, d_o, lse) = (rows(&qkv), rows(&o), rows(&d_o), rows(&saved.lse));
    let (h, k, d, group) = (spec.heads, spec.kv_heads, spec.head_dim, spec.heads / spec.kv_heads);
    let mask = |i, j| visible(spec, i, j);
    for (n, bounds) in cu.windows(2).enumerate() {
        let (from, to) = (bounds[0] as usize, bounds[1] as usize);
        let what = format!("{spec:?} sequence {n} of length {}", to - from);
        for kv in 0..k {
            let (keys, values) = (head(&qkv, from, to, h + kv, d), head(&qkv, from, to, h + k + kv, d));
            let (mut dk, mut dv) = (vec![vec![0.0; d]; to - from], vec![vec![0.0; d]; to - from]);
            for query in kv * group..(kv + 1) * group {
                let q = head(&qkv, from, to, query, d);
                let scale = spec.scale as f64;
                let (want_o, want_lse) = reference::attention::attention(&q, &keys, &values, scale, mask);
                let got = narrow(&head(&o, from, to, query, d));
                assert_close(&got, &want_o.concat(), 1.5e-6, &format!("o {what} head {query}"));
                let got: Vec<f32> = lse[from..to].iter().map(|row| row[query]).collect();
                assert_close(&got, &want_lse, 1e-6, &format!("lse {what} head {query}"));
                let d_o = head(&d_o, from, to, query, d);
                let (want_dq, more_dk, more_dv) =
                    reference::attention::attention_backward(&d_o, &q, &keys, &values, scale, mask);
                let got = narrow(&head(&dqkv, from, to, query, d));
                assert_close(&got, &want_dq.concat(), 1e-6, &format!("dq {what} head {query}"));
                for (sum, more) in dk.iter_mut().zip(more_dk).chain(dv.iter_mut().zip(more_dv)) {
                    sum.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
                }
            }
            let got = narrow(&head(&dqkv, from, to, h + kv, d));
            assert_close(&got, &dk.concat(), 1e-6, &format!("dk {what} head {kv}"));
            let got = narrow(&head(&dqkv, from, to, h + k + kv, d));
            assert_close(&got, &dv.concat(), 1e-6, &format!("dv {what} head {kv}"));
        }
    }
}

#[test]
fn matches_the_twin() {
    for spec in specs() {
        check(&spec, &LENGTHS);
    }
    // An empty sequence is a sequence.
    check(&spec(2, 1, 16, true, None), &[0, 5, 0, 66, 0]);
}

#[test]
fn twin_backward_matches_finite_differences() {
    let (n, d) = (9, 3);
    for (causal, window) in [(true, None), (false, None), (true, Some(4))] {
        let spec = spec(1, 1, d, causal, window);
        let mask = |i, j| visible(&spec, i, j);
        let split = |x: &[f64]| x.chunks(d).map(<[f64]>::to_vec).collect::<Vec<_>>();
        let d_o = split(&wide(&common::values(n * d, 1)));
        let x = wide(&common::values(3 * n * d, 2));
        let loss = |x: &[f64]| {
            let x = split(x);
            let (o, _) = reference::attention::attention(&x[..n], &x[n..2 * n], &x[2 * n..], 0.7, mask);
            o.concat().iter().zip(d_o.concat()).map(|(o, d_o)| o * d_o).sum::<f64>()
        };
        let want = gradient(&x, loss);
        let x = split(&x);
        let (dq, dk, dv) =
            reference::attention::attention_backward(&d_o, &x[..n], &x[n..2 * n], &x[2 * n..], 0.7, mask);
        assert_close(&narrow(&[dq, dk, dv].concat()), &want, 1e-6, "gradient");
    }
}

/// Output, log-sum-exp and gradient.
fn run(qkv: &Tensor, d_o: &Tensor, cu: &[u32], spec: &AttentionSpec) -> [Tensor; 3] {
    let (o, saved) = attention(qkv, cu, spec).unwrap();
    let dqkv = attention_backward(d_o, qkv, &o, &saved, cu, spec).unwrap();
    [o, saved.lse, dqkv]
}

#[test]
fn sequences_do_not_depend_on_the_batch() {
    for spec in specs() {
        let cu = cuts(&LENGTHS);
        let tokens = LENGTHS.iter().sum::<usize>();
        let (qkv, d_o) = (random(&[tokens, spec.qkv_width()], 3), random(&[tokens, spec.output_width()], 4));
        let packed = run(&qkv, &d_o, &cu, &spec);
        for (n, len) in LENGTHS.into_iter().enumerate() {
            let part = |t: &Tensor| t.narrow(0, cu[n] as usize, len).unwrap().copy().unwrap();
            let alone = run(&part(&qkv), &part(&d_o), &[0, len as u32], &spec);
            for (alone, packed) in alone.iter().zip(&packed) {
                assert_eq!(bits(alone), bits(&part(packed)), "{spec:?} sequence {n}");
            }
        }
    }
}

#[test]
fn a_prefix_does_not_depend_on_what_follows() {
    for spec in specs().into_iter().filter(|spec| spec.causal) {
        let qkv = random(&[150, spec.qkv_width()], 3);
        let (o, saved) = attention(&qkv, &[0, 150], &spec).unwrap();
        for len in [1, 2, 5, 63, 64, 66, 129] {
            let part = |t: &Tensor| t.narrow(0, 0, len).unwrap().copy().unwrap();
            let (short, short_saved) = attention(&part(&qkv), &[0, len as u32], &spec).unwrap();
            assert_eq!(bits(&short), bits(&part(&o)), "{spec:?} length {len}");
            assert_eq!(bits(&short_saved.lse), bits(&part(&saved.lse)), "{spec:?} length {len}");
        }
    }
}

#[test]
fn threads_do_not_matter() {
    for spec in specs() {
        let cu = cuts(&LENGTHS);
        let tokens = LENGTHS.iter().sum::<usize>();
        let (qkv, d_o) = (random(&[tokens, spec.qkv_width()], 3), random(&[tokens, spec.output_width()], 4));
        let run = |threads| with_threads(threads, || run(&qkv, &d_o, &cu, &spec).map(|t| bits(&t)));
        assert_eq!(run(1), run(3), "{spec:?}");
    }
}

#[test]
fn large_scores_do_not_overflow() {
    // Scores of ±2000: only the running maximum keeps them in range.
    let spec = AttentionSpec { scale: 100.0, ..spec(1, 1, 16, true, None) };
    let qkv = (random(&[100, 48], 5) * 2.0).unwrap();
    let (o, saved) = attention(&qkv, &[0, 100], &spec).unwrap();
    let all = [common::flat(&o), common::flat(&saved.lse)].concat();
    assert!(all.iter().all(|v| v.is_finite()));
    let qkv = rows(&qkv);
    let (q, k, v) = (head(&qkv, 0, 100, 0, 16), head(&qkv, 0, 100, 1, 16), head(&qkv, 0, 100, 2, 16));
    let (_, lse) = reference::attention::attention(&q, &k, &v, 100.0, |i, j| j <= i);
    assert_close(&common::flat(&saved.lse), &lse, 2e-6, "lse");
}

#[test]
fn misfits_are_errors() {
    let good = spec(2, 1, 16, true, None);
    let qkv = random(&[5, 64], 1);
    assert!(attention(&qkv, &[0, 5], &good).is_ok());
    for cu in [&[0u32, 4][..], &[1, 5], &[0, 3, 2, 5], &[]] {
        assert!(matches!(attention(&qkv, cu, &good), Err(Error::Shape { what: "cu_seqlens", .. })));
    }
    assert!(attention(&random(&[5, 60], 1), &[0, 5], &good).is_err());
    assert!(attention(&qkv, &[0, 5], &AttentionSpec { kv_heads: 0, ..good }).is_err());
    assert!(attention(&qkv, &[0, 5], &AttentionSpec { window: Some(0), ..good }).is_err());
    assert!(attention(&qkv, &[0, 5], &AttentionSpec { window: Some(3), causal: false, ..good }).is_err());
    let (o, saved) = attention(&qkv, &[0, 5], &good).unwrap();
    let short = tensor(&[0.0; 4 * 32], &[4, 32]);
    assert!(attention_backward(&short, &qkv, &o, &saved, &[0, 5], &good).is_err());
}
