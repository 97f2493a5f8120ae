//! Norms against their twins and finite differences, alone and in a batch, on any number of threads.

mod common;

use candle_core::{DType, Tensor};
use common::{assert_close, assert_within, bits, flat, gradient, random, rows, values, wide, with_threads, zeros};
use tandem_kernels::norm::{
    NormStats, add_layer_norm, add_rms_norm, layer_norm, layer_norm_backward, layer_norm_backward_add, rms_norm,
    rms_norm_backward, rms_norm_backward_add,
};
use tandem_kernels::slice::{to_bf16, to_f32};
use tandem_kernels::{Error, reference};

const EPS: f64 = 1e-5;
const TOKENS: [usize; 5] = [1, 2, 63, 65, 130];

fn dot(a: &[f32], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| *a as f64 * b).sum()
}

/// Forward and backward of either norm: `y`, `dx`, `dw`, `db`.
fn run(layer: bool, x: &Tensor, dy: &Tensor, w: &Tensor, b: &Tensor) -> [Tensor; 4] {
    let (dw, db) = (zeros(w.dims()), zeros(w.dims()));
    let (y, dx) = if layer {
        let (y, stats) = layer_norm(x, w, b, EPS).unwrap();
        (y, layer_norm_backward(dy, x, w, &stats, &dw, &db).unwrap())
    } else {
        let (y, stats) = rms_norm(x, w, EPS).unwrap();
        (y, rms_norm_backward(dy, x, w, &stats, &dw).unwrap())
    };
    [y, dx, dw, db]
}

fn twin(layer: bool, x: &[f64], w: &[f64], b: &[f64]) -> Vec<f64> {
    if layer { reference::norm::layer_norm(x, w, b, EPS) } else { reference::norm::rms_norm(x, w, EPS) }
}

fn check(layer: bool, tokens: usize, width: usize) {
    let what = format!("layer={layer} T={tokens} d={width}");
    let (x, dy) = (random(&[tokens, width], 1), random(&[tokens, width], 2));
    let (w, b) = (random(&[width], 3), random(&[width], 4));
    let [y, dx, dw, db] = run(layer, &x, &dy, &w, &b);
    let (w, b) = (wide(&flat(&w)), wide(&flat(&b)));
    let (mut want_dw, mut want_db) = (vec![0.0; width], vec![0.0; width]);
    let (y, dx) = (rows(&y), rows(&dx));
    for (t, (x, dy)) in rows(&x).iter().zip(rows(&dy)).enumerate() {
        let x = wide(x);
        assert_close(&y[t], &twin(layer, &x, &w, &b), 1e-6, &format!("y {what} t={t}"));
        let want = gradient(&x, |x| dot(&dy, &twin(layer, x, &w, &b)));
        // Linear in w and b: the twin at w = 1, b = 0 is the normalised row.
        let normalised = twin(layer, &x, &vec![1.0; width], &vec![0.0; width]);
        // dx is what is left of terms of size r · |w dy|, where r grows as the row shrinks.
        let centre = if layer { x.iter().sum::<f64>() / width as f64 } else { 0.0 };
        let r = 1.0 / (x.iter().map(|x| (x - centre).powi(2)).sum::<f64>() / width as f64 + EPS).sqrt();
        let largest = dy.iter().zip(&w).fold(0.0, |m: f64, (dy, w)| m.max((*dy as f64 * w).abs()));
        let conditioning = 1.0 + normalised.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
        assert_within(&dx[t], &want, 1e-6 * r * largest * conditioning, &format!("dx {what} t={t}"));
        for i in 0..width {
            want_dw[i] += dy[i] as f64 * normalised[i];
            want_db[i] += dy[i] as f64;
        }
    }
    assert_close(&flat(&dw), &want_dw, 2e-6, &format!("dw {what}"));
    if layer {
        assert_close(&flat(&db), &want_db, 2e-6, &format!("db {what}"));
    }
}

#[test]
fn match_twins_and_finite_differences() {
    for layer in [false, true] {
        for tokens in TOKENS {
            for width in [1, 3, 17] {
                check(layer, tokens, width);
            }
        }
        check(layer, 2, 576);
    }
}

#[test]
fn rows_do_not_depend_on_the_batch() {
    for layer in [false, true] {
        for width in [3, 64, 576] {
            let (x, dy) = (random(&[70, width], 5), random(&[70, width], 6));
            let (w, b) = (random(&[width], 7), random(&[width], 8));
            let [y, dx, ..] = run(layer, &x, &dy, &w, &b);
            for t in [0, 1, 33, 69] {
                let row = |t: usize, x: &Tensor| x.narrow(0, t, 1).unwrap().contiguous().unwrap();
                let [y1, dx1, ..] = run(layer, &row(t, &x), &row(t, &dy), &w, &b);
                assert_eq!(bits(&y1), bits(&row(t, &y)));
                assert_eq!(bits(&dx1), bits(&row(t, &dx)));
            }
        }
    }
}

#[test]
fn threads_do_not_matter() {
    for layer in [false, true] {
        let (x, dy) = (random(&[333, 100], 5), random(&[333, 100], 6));
        let (w, b) = (random(&[100], 7), random(&[100], 8));
        let one = with_threads(1, || run(layer, &x, &dy, &w, &b).map(|t| bits(&t)));
        let three = with_threads(3, || run(layer, &x, &dy, &w, &b).map(|t| bits(&t)));
        assert_eq!(one, three);
    }
}

#[test]
fn parameter_gradients_accumulate() {
    let (x, dy, w) = (random(&[5, 8], 1), random(&[5, 8], 2), random(&[8], 3));
    let (_, stats) = rms_norm(&x, &w, EPS).unwrap();
    let once = zeros(&[8]);
    rms_norm_backward(&dy, &x, &w, &stats, &once).unwrap();
    // A view into a flat buffer, as the engine has it.
    let buffer = random(&[20], 4);
    let before = flat(&buffer);
    rms_norm_backward(&dy, &x, &w, &stats, &buffer.narrow(0, 6, 8).unwrap()).unwrap();
    let want: Vec<f64> = (0..20)
        .map(|i| before[i] as f64 + if (6..14).contains(&i) { flat(&once)[i - 6] as f64 } else { 0.0 })
        .collect();
    assert_close(&flat(&buffer), &want, 1e-7, "accumulated");
}

#[test]
fn large_offset_does_not_cancel() {
    // Mean 1000, deviation about 0.6: a one-pass variance in f32 would lose it.
    let x: Vec<f32> = values(256, 9).iter().map(|v| 1000.0 + v).collect();
    let x = common::tensor(&x, &[1, 256]);
    let (w, b) = (common::tensor(&[1.0; 256], &[256]), zeros(&[256]));
    let (y, _) = layer_norm(&x, &w, &b, EPS).unwrap();
    let want = reference::norm::layer_norm(&wide(&flat(&x)), &[1.0; 256], &[0.0; 256], EPS);
    assert_close(&flat(&y), &want, 1e-4, "y");
}

#[test]
fn misfits_are_errors() {
    let (x, w) = (random(&[2, 8], 1), random(&[7], 2));
    assert!(matches!(rms_norm(&x, &w, EPS), Err(Error::Shape { op: "rms_norm", .. })));
    assert!(rms_norm(&random(&[2, 3, 8], 1), &random(&[8], 2), EPS).is_err());
    let half = x.to_dtype(candle_core::DType::F16).unwrap();
    assert!(matches!(rms_norm(&half, &random(&[8], 2), EPS), Err(Error::Dtype { .. })));
    let w = random(&[8], 2);
    let (_, stats) = rms_norm(&x, &w, EPS).unwrap();
    let other = NormStats { mean: Some(zeros(&[2])), ..stats.clone() };
    assert!(rms_norm_backward(&x, &x, &w, &other, &zeros(&[8])).is_err());
    assert!(rms_norm_backward(&x, &random(&[3, 8], 1), &w, &stats, &zeros(&[8])).is_err());
}

/// The bits of a tensor of either type, as those of its f32 values.
fn wide_bits(t: &Tensor) -> Vec<u32> {
    bits(&to_f32(t).unwrap())
}

fn narrow(t: &Tensor) -> Tensor {
    to_bf16(t).unwrap()
}

/// `x`, `dy`, `w`, `b` of 70 rows, exact in bf16 but in f32.
fn rounded(width: usize) -> [Tensor; 4] {
    let shapes: [&[usize]; 4] = [&[70, width], &[70, width], &[width], &[width]];
    [5, 6, 7, 8].map(|seed| to_f32(&narrow(&random(shapes[seed as usize - 5], seed))).unwrap())
}

#[test]
fn bf16_matches_twins_on_rounded_inputs() {
    for layer in [false, true] {
        for width in [1, 3, 17, 576] {
            let [x, dy, w, b] = rounded(width);
            let [y, ..] = run(layer, &narrow(&x), &narrow(&dy), &narrow(&w), &narrow(&b));
            assert_eq!(y.dtype(), DType::BF16);
            let (w, b) = (wide(&flat(&w)), wide(&flat(&b)));
            for (t, (x, y)) in rows(&x).iter().zip(rows(&to_f32(&y).unwrap())).enumerate() {
                let want = twin(layer, &wide(x), &w, &b);
                let largest = want.iter().fold(1.0, |m: f64, v| m.max(v.abs()));
                for (y, want) in y.iter().zip(&want) {
                    // The bound of f32 and one rounding, of at most 2^-8 of the result.
                    let bound = 1e-6 * largest + (want.abs() + 1e-6 * largest) / 256.0;
                    assert!((*y as f64 - want).abs() <= bound, "layer={layer} d={width} t={t}: {y} {want}");
                }
            }
        }
    }
}

#[test]
fn bf16_is_f32_rounded_once() {
    for layer in [false, true] {
        for width in [1, 3, 17, 100, 576] {
            let [x, dy, w, b] = rounded(width);
            let [y, dx, dw, db] = run(layer, &x, &dy, &w, &b);
            let parameters = (narrow(&w), narrow(&b));
            for (half_x, half_dy) in [(false, false), (false, true), (true, false), (true, true)] {
                let x = if half_x { narrow(&x) } else { x.clone() };
                let dy = if half_dy { narrow(&dy) } else { dy.clone() };
                let [got_y, got_dx, got_dw, got_db] = run(layer, &x, &dy, &parameters.0, &parameters.1);
                assert_eq!(wide_bits(&got_y), wide_bits(&narrow(&y)));
                assert_eq!(got_dx.dtype(), x.dtype());
                let want_dx = if half_x { narrow(&dx) } else { dx.clone() };
                assert_eq!(wide_bits(&got_dx), wide_bits(&want_dx));
                assert_eq!((bits(&got_dw), bits(&got_db)), (bits(&dw), bits(&db)));
            }
        }
    }
}

/// Forward with the addition before it, backward with the addition after it: `h`, `y`, `dx`, `dw`, `db`.
fn run_fused(layer: bool, inputs: &[Tensor; 6]) -> [Tensor; 5] {
    let [x, out, dy, residual, w, b] = inputs;
    let (dw, db) = (zeros(w.dims()), zeros(w.dims()));
    let (h, y, dx) = if layer {
        let (h, y, stats) = add_layer_norm(x, out, w, b, EPS).unwrap();
        let dx = layer_norm_backward_add(dy, &h, w, &stats, residual, &dw, &db).unwrap();
        (h, y, dx)
    } else {
        let (h, y, stats) = add_rms_norm(x, out, w, EPS).unwrap();
        let dx = rms_norm_backward_add(dy, &h, w, &stats, residual, &dw).unwrap();
        (h, y, dx)
    };
    [h, y, dx, dw, db]
}

#[test]
fn fused_forms_have_the_bits_of_separate_ones() {
    for layer in [false, true] {
        for width in [1, 17, 576] {
            let [x, residual] = [1, 2].map(|seed| random(&[130, width], seed));
            let [out, dy] = [3, 4].map(|seed| random(&[130, width], seed));
            let [w, b] = [5, 6].map(|seed| random(&[width], seed));
            for (half_out, half_w) in [(false, false), (true, false), (false, true), (true, true)] {
                let out = if half_out { narrow(&out) } else { out.clone() };
                let [w, b] = [&w, &b].map(|p| if half_w { narrow(p) } else { p.clone() });
                let dy = if half_out && half_w { narrow(&dy) } else { dy.clone() };
                let h = (&x + to_f32(&out).unwrap()).unwrap();
                let [y, dx, dw, db] = run(layer, &h, &dy, &w, &b);
                let want = [h, y, (&residual + dx).unwrap(), dw, db];
                let inputs = [x.clone(), out, dy, residual.clone(), w, b];
                for threads in [1, 3] {
                    let got = with_threads(threads, || run_fused(layer, &inputs));
                    for (got, want) in got.iter().zip(&want) {
                        assert_eq!(got.dtype(), want.dtype());
                        assert_eq!(wide_bits(got), wide_bits(want), "layer={layer} d={width}");
                    }
                }
                let row =
                    |t: &Tensor| if t.rank() == 2 { t.narrow(0, 67, 1).unwrap().copy().unwrap() } else { t.clone() };
                let alone = run_fused(layer, &inputs.each_ref().map(row));
                for (alone, want) in alone.iter().zip(&want).take(3) {
                    assert_eq!(wide_bits(alone), wide_bits(&row(want)));
                }
            }
        }
    }
}

#[test]
fn mixtures_of_types_without_a_meaning_are_errors() {
    let (x, w) = (random(&[2, 8], 1), random(&[8], 2));
    let (x16, w16) = (narrow(&x), narrow(&w));
    let message = |error: Error| error.to_string();
    assert!(message(rms_norm(&x16, &w, EPS).unwrap_err()).contains("dtype of w must be BF16, got F32"));
    assert!(message(layer_norm(&x, &w16, &w, EPS).unwrap_err()).contains("dtype of b must be BF16"));
    assert!(message(add_rms_norm(&x16, &x16, &w16, EPS).unwrap_err()).contains("dtype of x must be F32"));
    let (_, stats) = rms_norm(&x, &w, EPS).unwrap();
    assert!(message(rms_norm_backward(&x16, &x, &w, &stats, &w).unwrap_err()).contains("dtype of dy must be F32"));
    assert!(rms_norm_backward(&x, &x16, &w, &stats, &w).is_err());
    assert!(rms_norm_backward(&x, &x, &w16, &stats, &w16).is_err(), "gradients of parameters are f32");
}
