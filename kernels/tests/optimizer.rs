//! AdamW and the moving average: against the f64 twin over many steps, and against how buffers are cut.

mod common;

use candle_core::{Device, Tensor};
use common::{bits, with_threads};
use tandem_kernels::optimizer::{AdamWConfig, adamw_step, ema_update};
use tandem_kernels::reference::optimizer::adamw;
use tandem_kernels::rng::{Philox, Purpose};

fn random(len: usize, sample: u64) -> Vec<f32> {
    let mut values = vec![0.0; len];
    Philox::new(2, Purpose::Init, 0).fill_normal(sample, 0, 0.5, &mut values);
    values
}

fn tensor(values: &[f32]) -> Tensor {
    Tensor::from_slice(values, values.len(), &Device::Cpu).unwrap()
}

#[test]
fn twenty_steps_match_the_twin() {
    for (len, config, weight_decay, grad_scale) in [
        (1, AdamWConfig::default(), 0.0, 1.0),
        (17, AdamWConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8 }, 0.1, 0.25),
        (40_001, AdamWConfig { beta1: 0.0, beta2: 0.99, eps: 1e-5 }, 0.01, 1.0),
    ] {
        let start = random(len, 0);
        let (param, m, v) = (tensor(&start), tensor(&vec![0.0; len]), tensor(&vec![0.0; len]));
        let mut twin: Vec<(f64, f64, f64)> = start.iter().map(|&p| (f64::from(p), 0.0, 0.0)).collect();
        for step in 1..=20 {
            let (lr, grad) = (1e-2 / step as f64, random(len, step));
            adamw_step(&param, &tensor(&grad), &m, &v, lr, weight_decay, step, grad_scale, &config).unwrap();
            for ((p, m, v), grad) in twin.iter_mut().zip(grad) {
                let grad = f64::from(grad) * f64::from(grad_scale);
                (*p, *m, *v) = adamw(*p, grad, *m, *v, lr, weight_decay, step, &config);
            }
        }
        let columns = [&param, &m, &v].map(|tensor| tensor.to_vec1::<f32>().unwrap());
        for (index, &(p, m, v)) in twin.iter().enumerate() {
            for (name, got, want) in
                [("p", columns[0][index], p), ("m", columns[1][index], m), ("v", columns[2][index], v)]
            {
                assert!((f64::from(got) - want).abs() < 2e-6 * (0.1 + want.abs()), "{name}[{index}]: {got} {want}");
            }
        }
    }
}

/// `torch.optim.AdamW(lr=0.1, weight_decay=0.5)`: the first step moves by `lr · sign(grad)` after decay.
#[test]
fn first_step_in_closed_form() {
    let param = tensor(&[2.0, -1.0, 3.0]);
    let (m, v) = (tensor(&[0.0; 3]), tensor(&[0.0; 3]));
    adamw_step(&param, &tensor(&[4.0, -0.5, 0.0]), &m, &v, 0.1, 0.5, 1, 1.0, &AdamWConfig::default()).unwrap();
    let expected = [2.0 * 0.95 - 0.1, -0.95 + 0.1, 3.0 * 0.95];
    for (got, want) in param.to_vec1::<f32>().unwrap().iter().zip(expected) {
        assert!((got - want).abs() < 1e-6, "{got} {want}");
    }
}

#[test]
fn cuts_and_threads_do_not_matter() {
    let len = 50_000;
    let config = AdamWConfig::default();
    let run = |cuts: &[usize], threads| {
        let tensors = [tensor(&random(len, 0)), tensor(&random(len, 1)), tensor(&random(len, 2)), {
            tensor(&random(len, 3).iter().map(|x| x * x).collect::<Vec<_>>())
        }];
        with_threads(threads, || {
            for range in cuts.windows(2) {
                let [p, g, m, v] = tensors.each_ref().map(|t| t.narrow(0, range[0], range[1] - range[0]).unwrap());
                adamw_step(&p, &g, &m, &v, 1e-3, 0.1, 3, 0.7, &config).unwrap();
                ema_update(&m, &p, 0.9).unwrap();
            }
        });
        tensors.each_ref().map(bits)
    };
    let whole = run(&[0, len], 1);
    assert_eq!(whole, run(&[0, len], 3));
    assert_eq!(whole, run(&[0, 1, 17, 16_391, 49_999, len], 3));
}

#[test]
fn moving_average() {
    let (target, source) = (tensor(&[1.0, 2.0, -3.0]), tensor(&[3.0, 2.0, 1.0]));
    ema_update(&target, &source, 0.75).unwrap();
    assert_eq!(target.to_vec1::<f32>().unwrap(), [1.5, 2.0, -2.0]);
    ema_update(&target, &source, 1.0).unwrap();
    assert_eq!(target.to_vec1::<f32>().unwrap(), [1.5, 2.0, -2.0]);
}

#[test]
fn refuses_what_it_cannot_update() {
    let [a, b, c, d] = [0, 1, 2, 3].map(|sample| tensor(&random(4, sample)));
    let config = AdamWConfig::default();
    let step = |v: &Tensor, step| adamw_step(&a, &b, &c, v, 1e-3, 0.0, step, 1.0, &config).map_err(|e| e.to_string());
    assert!(step(&d, 0).unwrap_err().contains("step must be at least 1"));
    assert!(step(&tensor(&[0.0; 3]), 1).unwrap_err().contains("v must be [4], got [3]"));
    // Overlapping storage would lock forever instead of failing.
    assert!(step(&c, 1).unwrap_err().contains("v must be in a storage of its own, got the storage of m"));
    assert!(ema_update(&a, &a.narrow(0, 0, 4).unwrap(), 0.5).is_err());
    assert_eq!(bits(&a), bits(&tensor(&random(4, 0))), "a refused call changes nothing");
    step(&d, 1).unwrap();
}
