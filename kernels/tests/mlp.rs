//! Activations against their twins and finite differences.

mod common;

use candle_core::Tensor;

use common::{assert_close, bits, flat, gradient, random, rows, tensor, values, wide, with_threads};
use tandem_kernels::mlp::Activation::{GeluErf, GeluTanh, Relu, Silu};
use tandem_kernels::mlp::{Activation, activation, activation_backward, gated, gated_backward, gated_backward_again};
use tandem_kernels::reference::mlp::activation as twin;
use tandem_kernels::slice::{to_bf16, to_f32};

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
fn nan_in_bf16_stays_where_it_is() {
    let (width, dy) = (77, to_bf16(&random(&[1, 77], 2)).unwrap());
    for at in [0, 1, 31, 32, 63, 64, 75, 76] {
        let mut x = inputs(2 * width, 1);
        x[at] = f32::NAN;
        let x = to_bf16(&tensor(&x, &[1, 2 * width])).unwrap();
        let (dx, y) = gated_backward_again(&dy, &x, Silu).unwrap();
        for y in [y, gated(&x, Silu).unwrap()] {
            let y = flat(&to_f32(&y).unwrap());
            assert!((0..width).all(|i| y[i].is_nan() == (i == at)), "{at}");
        }
        for dx in [dx, gated_backward(&dy, &x, Silu).unwrap()] {
            let dx = flat(&to_f32(&dx).unwrap());
            assert!((0..2 * width).all(|i| dx[i].is_nan() == (i % width == at)), "{at}");
        }
    }
}

#[test]
fn misfits_are_errors() {
    assert!(gated(&random(&[2, 5], 1), Silu).is_err());
    assert!(gated_backward(&random(&[2, 3], 1), &random(&[2, 4], 1), Silu).is_err());
    assert!(activation_backward(&random(&[2, 3], 1), &random(&[2, 4], 1), Silu).is_err());
}

#[test]
fn bf16_is_within_one_rounding_of_the_twin() {
    for act in ALL {
        let x = to_bf16(&tensor(&inputs(63 * 34, 3), &[63, 34])).unwrap();
        let x32 = flat(&to_f32(&x).unwrap());
        for (x, y) in x32.iter().zip(flat(&to_f32(&activation(&x, act).unwrap()).unwrap())) {
            // The bound of f32 and one rounding, of at most 2^-8 of the result.
            let want = twin(*x as f64, act);
            assert!((y as f64 - want).abs() <= 3e-6 + (want.abs() + 3e-6) / 256.0, "{act:?} {x}: {y} {want}");
        }
        for (row, y) in x32.chunks(34).zip(rows(&to_f32(&gated(&x, act).unwrap()).unwrap())) {
            for i in 0..17 {
                let want = twin(row[i] as f64, act) * row[17 + i] as f64;
                let bound = 4e-5 + (want.abs() + 4e-5) / 256.0;
                assert!((y[i] as f64 - want).abs() <= bound, "{act:?}: {} {want}", y[i]);
            }
        }
    }
}

#[test]
fn bf16_is_f32_rounded_once() {
    for act in ALL {
        for (tokens, width) in [(1, 1), (3, 17), (300, 77)] {
            let x = to_bf16(&tensor(&inputs(tokens * 2 * width, 5), &[tokens, 2 * width])).unwrap();
            let (dy, dy2) = (random(&[tokens, width], 6), random(&[tokens, 2 * width], 7));
            let [dy, dy2] = [dy, dy2].map(|dy| to_bf16(&dy).unwrap());
            let [x32, dy32, dy2_32] = [&x, &dy, &dy2].map(|t| to_f32(t).unwrap());
            let run = |x: &Tensor, dy: &Tensor, dy2: &Tensor| {
                [
                    gated(x, act).unwrap(),
                    gated_backward(dy, x, act).unwrap(),
                    activation(x, act).unwrap(),
                    activation_backward(dy2, x, act).unwrap(),
                ]
            };
            for (x, dy) in [(&x, &dy), (&x32, &dy32)] {
                let (dx, y) = gated_backward_again(dy, x, act).unwrap();
                let apart = [gated_backward(dy, x, act).unwrap(), gated(x, act).unwrap()];
                let wide = |t: &Tensor| bits(&to_f32(t).unwrap());
                assert_eq!([wide(&dx), wide(&y)], apart.each_ref().map(wide), "{act:?} again");
            }
            let want = run(&x32, &dy32, &dy2_32).map(|t| bits(&to_f32(&to_bf16(&t).unwrap()).unwrap()));
            assert_eq!(run(&x, &dy, &dy2).map(|t| bits(&to_f32(&t).unwrap())), want, "{act:?}");
            let last = |t: &Tensor| t.narrow(0, tokens - 1, 1).unwrap().copy().unwrap();
            let alone = run(&last(&x), &last(&dy), &last(&dy2)).map(|t| bits(&to_f32(&t).unwrap()));
            assert_eq!(alone, run(&x, &dy, &dy2).map(|t| bits(&to_f32(&last(&t)).unwrap())));
        }
    }
}

#[test]
fn types_are_not_mixed() {
    let (x, dy) = (random(&[2, 4], 1), to_bf16(&random(&[2, 2], 2)).unwrap());
    assert!(gated_backward(&dy, &x, Silu).unwrap_err().to_string().contains("dtype of dy must be F32, got BF16"));
    assert!(activation_backward(&x, &to_bf16(&x).unwrap(), Silu).is_err());
    assert!(gated(&x.to_dtype(candle_core::DType::F64).unwrap(), Silu).is_err());
}
