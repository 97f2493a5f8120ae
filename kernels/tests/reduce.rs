//! Reductions: against plain f64 loops, and independent of threads.

mod common;

use candle_core::{Device, Tensor};
use common::with_threads;
use tandem_kernels::reduce::{all_finite, first_non_finite, max_abs, sum, sum_squares};
use tandem_kernels::rng::{Philox, Purpose};

const LENGTHS: [usize; 9] = [0, 1, 15, 16, 17, 4095, 4096, 4097, 100_003];

fn values(len: usize) -> Vec<f32> {
    let mut values = vec![0.0; len];
    Philox::new(1, Purpose::Init, 0).fill_normal(len as u64, 0, 3.0, &mut values);
    values
}

fn tensor(values: &[f32]) -> Tensor {
    Tensor::from_slice(values, values.len(), &Device::Cpu).unwrap()
}

#[test]
fn sums_match_plain_loops() {
    for len in LENGTHS {
        let x = values(len);
        let t = tensor(&x);
        let plain: f64 = x.iter().map(|&v| f64::from(v)).sum();
        let squares: f64 = x.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
        assert!((sum(&t).unwrap() - plain).abs() <= 1e-12 * (1.0 + len as f64), "sum of {len}");
        assert!((sum_squares(&t).unwrap() - squares).abs() <= 1e-13 * squares, "squares of {len}");
        assert_eq!(max_abs(&t).unwrap(), x.iter().fold(0f32, |max, v| max.max(v.abs())), "max of {len}");
    }
}

/// The order that the module documents, written out.
#[test]
fn order_is_chunks_lanes_pairs() {
    fn pairwise(values: &[f64]) -> f64 {
        if values.len() <= 1 {
            return values.first().copied().unwrap_or(0.0);
        }
        let (left, right) = values.split_at(values.len().next_power_of_two() / 2);
        pairwise(left) + pairwise(right)
    }
    let x = values(100_003);
    let chunks: Vec<f64> = x
        .chunks(4096)
        .map(|chunk| {
            let mut lanes = [0f64; 16];
            for (index, &value) in chunk.iter().enumerate() {
                lanes[index % 16] += f64::from(value);
            }
            pairwise(&lanes)
        })
        .collect();
    assert_eq!(sum(&tensor(&x)).unwrap().to_bits(), pairwise(&chunks).to_bits());
}

#[test]
fn threads_do_not_matter() {
    let t = tensor(&values(100_003));
    let on = |threads| with_threads(threads, || (sum(&t).unwrap().to_bits(), sum_squares(&t).unwrap().to_bits()));
    assert_eq!(on(1), on(3));
}

#[test]
fn finds_the_first_non_finite() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -f32::NAN] {
        for index in [0, 1, 4095, 4096, 9000] {
            let mut x = values(9001);
            assert!(all_finite(&tensor(&x)).unwrap());
            x[index] = bad;
            x[9000] = bad;
            let t = tensor(&x);
            assert_eq!(first_non_finite(&t).unwrap(), Some(index));
            assert!(!all_finite(&t).unwrap());
            let max = max_abs(&t).unwrap();
            assert!(if bad.is_nan() { max.is_nan() } else { max == f32::INFINITY });
        }
    }
    assert_eq!(first_non_finite(&tensor(&[])).unwrap(), None);
}

#[test]
fn views_count_only_their_part() {
    let t = tensor(&[1.0, 2.0, f32::NAN, 4.0, 5.0]);
    let part = t.narrow(0, 3, 2).unwrap();
    assert_eq!(sum(&part).unwrap(), 9.0);
    assert!(all_finite(&part).unwrap());
    let columns = Tensor::zeros((4, 4), candle_core::DType::F32, &Device::Cpu).unwrap().narrow(1, 0, 2).unwrap();
    assert!(sum(&columns).unwrap_err().to_string().contains("contiguous"));
}
