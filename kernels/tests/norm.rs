//! Norms against their twins and finite differences, alone and in a batch, on any number of threads.

mod common;

use candle_core::Tensor;
use common::{assert_close, assert_within, bits, flat, gradient, random, rows, values, wide, with_threads, zeros};
use tandem_kernels::norm::{NormStats, layer_norm, layer_norm_backward, rms_norm, rms_norm_backward};
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
