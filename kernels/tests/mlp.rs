//! Activations against their twins and finite differences.

mod common;

use common::{assert_close, bits, flat, gradient, random, rows, tensor, values, wide, with_threads};
use tandem_kernels::mlp::Activation::{GeluErf, GeluTanh, Relu, Silu};
use tandem_kernels::mlp::{Activation, activation, activation_backward, gated, gated_backward};
use tandem_kernels::reference::mlp::activation as twin;

const ALL: [Activation; 4] = [Silu, GeluTanh, GeluErf, Relu];

/// Values in (-6, 6), none near zero, where ReLU has no derivative.
fn inputs(n: usize, seed: u64) -> Vec<f32> {
    values(n, seed).iter().map(|v| if v.abs() < 1e-3 { 0.5 } else { 6.0 * v }).collect()
}

#[test]
fn values_and_slopes_match_twins() {
    for act in ALL {
        for (tokens, width) in [(1, 1), (2, 3), (63, 17), (65, 100)] {
            let n = tokens * width;
            let (x, dy) = (inputs(n, 1), values(n, 2));
            let (tx, tdy) = (tensor(&x, &[tokens, width]), tensor(&dy, &[tokens, width]));
            let y = flat(&activation(&tx, act).unwrap());
            let dx = flat(&activation_backward(&tdy, &tx, act).unwrap());
            let want: Vec<f64> = x.iter().map(|x| twin(*x as f64, act)).collect();
            assert_close(&y, &want, 5e-7, &format!("{act:?} y"));
            let slope = |x: f32| gradient(&[x as f64], |x| twin(x[0], act))[0];
            let want: Vec<f64> = x.iter().zip(&dy).map(|(x, dy)| *dy as f64 * slope(*x)).collect();
            assert_close(&dx, &want, 1e-6, &format!("{act:?} dx"));
        }
    }
}

#[test]
fn gated_units_match_twins() {
    for act in ALL {
        for (tokens, width) in [(1, 1), (2, 3), (7, 17), (3, 100)] {
            let (x, dy) = (inputs(tokens * 2 * width, 3), random(&[tokens, width], 4));
            let x = tensor(&x, &[tokens, 2 * width]);
            let y = rows(&gated(&x, act).unwrap());
            let dx = rows(&gated_backward(&dy, &x, act).unwrap());
            for (t, (x, dy)) in rows(&x).iter().zip(rows(&dy)).enumerate() {
                let unit = |x: &[f64]| (0..width).map(|i| twin(x[i], act) * x[width + i]).collect::<Vec<_>>();
                assert_close(&y[t], &unit(&wide(x)), 1e-6, &format!("{act:?} y"));
                let loss = |x: &[f64]| unit(x).iter().zip(&dy).map(|(y, dy)| y * *dy as f64).sum::<f64>();
                assert_close(&dx[t], &gradient(&wide(x), loss), 2e-6, &format!("{act:?} dx"));
            }
        }
    }
}

#[test]
fn rows_and_threads_do_not_matter() {
    for act in ALL {
        let (x, dy) = (random(&[300, 2 * 77], 5), random(&[300, 77], 6));
        let run = || [gated(&x, act).unwrap(), gated_backward(&dy, &x, act).unwrap()].map(|t| bits(&t));
        assert_eq!(with_threads(1, run), with_threads(3, run));
        let row = |t: &candle_core::Tensor| t.narrow(0, 123, 1).unwrap().copy().unwrap();
        let alone = gated(&row(&x), act).unwrap();
        assert_eq!(bits(&alone), bits(&row(&gated(&x, act).unwrap())));
    }
}

#[test]
fn nan_is_not_hidden() {
    let x = tensor(&[f32::NAN, 1.0], &[1, 2]);
    for act in ALL {
        assert!(flat(&gated(&x, act).unwrap())[0].is_nan(), "{act:?}");
        assert!(flat(&activation(&x, act).unwrap())[0].is_nan(), "{act:?}");
    }
}

#[test]
fn misfits_are_errors() {
    assert!(gated(&random(&[2, 5], 1), Silu).is_err());
    assert!(gated_backward(&random(&[2, 3], 1), &random(&[2, 4], 1), Silu).is_err());
    assert!(activation_backward(&random(&[2, 3], 1), &random(&[2, 4], 1), Silu).is_err());
}
