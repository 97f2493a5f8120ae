//! Updates on slices: against their f64 twins, their tensor versions, and how a buffer is cut.

mod common;

use common::{bits, tensor, values, with_threads};
use tandem_kernels::optimizer::{AdamWConfig, adamw_slice, adamw_step, ema_slice, ema_update, onebit, sign_sgd_slice};
use tandem_kernels::reference::optimizer as twin;

const LEN: usize = 40_001;
const CONFIG: AdamWConfig = AdamWConfig { beta1: 0.9, beta2: 0.95, eps: 1e-6 };

fn squares(seed: u64) -> Vec<f32> {
    values(LEN, seed).iter().map(|value| value * value).collect()
}

fn assert_twin(got: &[f32], want: impl Fn(usize) -> f64, what: &str) {
    for (index, &got) in got.iter().enumerate() {
        let want = want(index);
        assert!((f64::from(got) - want).abs() < 1e-6 * (0.1 + want.abs()), "{what}[{index}]: {got} {want}");
    }
}

/// One call of every update on ranges of one buffer each: (param, m, v).
fn run(cuts: &[usize], threads: usize) -> [Vec<u32>; 3] {
    let (mut param, mut m, mut v) = (values(LEN, 1), values(LEN, 2), squares(3));
    let (grad, sign) = (values(LEN, 4), values(LEN, 5).iter().map(|value| value.signum()).collect::<Vec<_>>());
    with_threads(threads, || {
        for range in cuts.windows(2).map(|range| range[0]..range[1]) {
            let (param, m, v) = (&mut param[range.clone()], &mut m[range.clone()], &mut v[range.clone()]);
            let (grad, sign) = (&grad[range.clone()], &sign[range]);
            adamw_slice(param, grad, m, v, 1e-3, 0.1, 3, 0.7, &CONFIG).unwrap();
            onebit::momentum_slice(m, grad, 0.9, 0.5).unwrap();
            onebit::variance_slice(v, grad, 0.95, 0.5).unwrap();
            onebit::apply_slice(param, m, v, 1e-3, 1e-6, 0.1).unwrap();
            sign_sgd_slice(param, sign, 1e-3, 0.1).unwrap();
            ema_slice(m, param, 0.9).unwrap();
        }
    });
    [param, m, v].map(|part| part.iter().map(|value| value.to_bits()).collect())
}

#[test]
fn cuts_and_threads_do_not_matter() {
    let whole = run(&[0, LEN], 1);
    assert_eq!(whole, run(&[0, LEN], 3));
    assert_eq!(whole, run(&[0, 1, 17, 16_391, LEN], 2));
}

#[test]
fn adamw_and_the_average_are_those_of_tensors() {
    let (start, grad) = (values(LEN, 1), values(LEN, 2));
    let (mut param, mut m, mut v) = (start.clone(), vec![0.0; LEN], vec![0.0; LEN]);
    let [p, g, tensor_m, tensor_v] = [&start, &grad, &m, &v].map(|part| tensor(part, &[LEN]));
    for step in 1..=3 {
        adamw_slice(&mut param, &grad, &mut m, &mut v, 1e-2, 0.1, step, 0.5, &CONFIG).unwrap();
        adamw_step(&p, &g, &tensor_m, &tensor_v, 1e-2, 0.1, step, 0.5, &CONFIG).unwrap();
    }
    ema_slice(&mut m, &param, 0.75).unwrap();
    ema_update(&tensor_m, &p, 0.75).unwrap();
    for (slice, want) in [(&param, &p), (&m, &tensor_m), (&v, &tensor_v)] {
        assert_eq!(bits(&tensor(slice, &[LEN])), bits(want));
    }
    let (mut param, mut m, mut v) = (start.clone(), values(LEN, 3), squares(4));
    let (old_m, old_v) = (m.clone(), v.clone());
    adamw_slice(&mut param, &grad, &mut m, &mut v, 1e-2, 0.1, 7, 0.5, &CONFIG).unwrap();
    let want = |i: usize| {
        let [p, g, m, v] = [start[i], 0.5 * grad[i], old_m[i], old_v[i]].map(f64::from);
        twin::adamw(p, g, m, v, 1e-2, 0.1, 7, &CONFIG)
    };
    // The quotient of a momentum by the root of a small variance amplifies the rounding of both.
    for (index, &got) in param.iter().enumerate() {
        let want = want(index).0;
        let bound = 1e-6 * (0.1 + want.abs() + (want - f64::from(start[index])).abs());
        assert!((f64::from(got) - want).abs() < bound, "param[{index}]: {got} {want}");
    }
    assert_twin(&m, |i| want(i).1, "m");
    assert_twin(&v, |i| want(i).2, "v");
}

#[test]
fn sign_descent_matches_its_twin() {
    let start = values(LEN, 1);
    let sign: Vec<f32> = values(LEN, 2).iter().map(|value| (value * 3.0).round().clamp(-1.0, 1.0)).collect();
    assert!([-1.0, 0.0, 1.0].iter().all(|value| sign.contains(value)));
    for (lr, weight_decay) in [(0.1, 0.0), (1e-3, 0.1)] {
        let mut param = start.clone();
        sign_sgd_slice(&mut param, &sign, lr, weight_decay).unwrap();
        assert_twin(&param, |i| twin::sign_sgd(start[i].into(), sign[i].into(), lr, weight_decay), "param");
    }
}

/// The three pieces in order are one step of Adam without bias correction.
#[test]
fn onebit_pieces_match_their_twin() {
    let (start, start_m, start_v, grad) = (values(LEN, 1), values(LEN, 2), squares(3), values(LEN, 4));
    for (lr, weight_decay, scale) in [(1e-2, 0.0, 1.0), (1e-3, 0.1, 0.25f32)] {
        let (mut param, mut m, mut v) = (start.clone(), start_m.clone(), start_v.clone());
        onebit::momentum_slice(&mut m, &grad, CONFIG.beta1, scale).unwrap();
        onebit::variance_slice(&mut v, &grad, CONFIG.beta2, scale).unwrap();
        onebit::apply_slice(&mut param, &m, &v, lr, CONFIG.eps, weight_decay).unwrap();
        let want = |i: usize| {
            let [p, g, m, v] = [start[i], grad[i] * scale, start_m[i], start_v[i]].map(f64::from);
            twin::onebit(p, g, m, v, lr, weight_decay, &CONFIG)
        };
        for (index, &got) in param.iter().enumerate() {
            let want = want(index).0;
            let bound = 1e-6 * (0.1 + want.abs() + (want - f64::from(start[index])).abs());
            assert!((f64::from(got) - want).abs() < bound, "param[{index}]: {got} {want}");
        }
        assert_twin(&m, |i| want(i).1, "m");
        assert_twin(&v, |i| want(i).2, "v");
    }
}

#[test]
fn lengths_that_differ_are_refused() {
    let (mut a, mut b, mut c, short) = ([1.0f32; 4], [1.0f32; 4], [1.0f32; 4], [1.0f32; 3]);
    let messages = [
        adamw_slice(&mut a, &short, &mut b, &mut c, 0.1, 0.0, 1, 1.0, &CONFIG),
        ema_slice(&mut a, &short, 0.9),
        sign_sgd_slice(&mut a, &short, 0.1, 0.0),
        onebit::momentum_slice(&mut a, &short, 0.9, 1.0),
        onebit::variance_slice(&mut a, &short, 0.9, 1.0),
        onebit::apply_slice(&mut a, &b, &short, 0.1, 1e-8, 0.0),
    ]
    .map(|result| result.unwrap_err().to_string());
    for (message, op) in messages.iter().zip([
        "adamw_slice: grad",
        "ema_slice: source",
        "sign_sgd_slice: sign",
        "onebit::momentum_slice: grad",
        "onebit::variance_slice: grad",
        "onebit::apply_slice: v",
    ]) {
        assert_eq!(*message, format!("{op} must be [4], got [3]"));
    }
    let step_zero = adamw_slice(&mut a, &[1.0; 4], &mut b, &mut c, 0.1, 0.0, 0, 1.0, &CONFIG).unwrap_err().to_string();
    assert!(step_zero.contains("step must be at least 1"));
    assert_eq!((a, b, c), ([1.0; 4], [1.0; 4], [1.0; 4]), "a refused call changes nothing");
}
