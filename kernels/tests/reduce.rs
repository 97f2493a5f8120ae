//! Reductions: against plain f64 loops, and independent of threads.

mod common;

use candle_core::{Device, Tensor};
use common::with_threads;
use tandem_kernels::reduce::{
    BLOCK, add_slice, all_finite, block_sum_squares, first_non_finite, max_abs, pairwise_sum, scale_slice, sum,
    sum_squares,
};
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

/// Blocks hold the plain sums of their elements, in the order written out here, whoever computes which run of blocks.
#[test]
fn block_sums_do_not_depend_on_cuts() {
    for len in LENGTHS {
        let x = values(len);
        let mut whole = vec![7.0];
        block_sum_squares(&x, &mut whole);
        assert_eq!((whole.len(), whole[0]), (1 + len.div_ceil(BLOCK), 7.0), "sums are appended");
        whole.remove(0);
        for (block, sum) in x.chunks(BLOCK).zip(&whole) {
            let mut lanes = [0f64; 16];
            for (index, &value) in block.iter().enumerate() {
                lanes[index % 16] += f64::from(value) * f64::from(value);
            }
            for width in [8, 4, 2, 1] {
                // The tree over 16 lanes: halves first to last, joined pairwise from the leaves up.
                lanes = std::array::from_fn(|i| if i < width { lanes[2 * i] + lanes[2 * i + 1] } else { 0.0 });
            }
            assert_eq!(sum.to_bits(), lanes[0].to_bits());
        }
        let (mut parts, cut) = (Vec::new(), (len / 2).next_multiple_of(BLOCK).min(len));
        with_threads(3, || {
            block_sum_squares(&x[..cut], &mut parts);
            block_sum_squares(&x[cut..], &mut parts);
        });
        assert_eq!(parts, whole);
        let plain: f64 = x.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
        assert!((pairwise_sum(&whole) - plain).abs() <= 1e-13 * plain, "squares of {len}");
    }
}

#[test]
fn slices_are_added_and_scaled() {
    let (start, term) = (values(40_001), values(40_001).into_iter().rev().collect::<Vec<_>>());
    let mut target = start.clone();
    add_slice(&mut target, &term).unwrap();
    scale_slice(&mut target, 0.3);
    for ((got, start), term) in target.iter().zip(&start).zip(&term) {
        let want = (f64::from(*start) + f64::from(*term)) * f64::from(0.3f32);
        assert!((f64::from(*got) - want).abs() <= 2e-7 * (want.abs() + start.abs() as f64), "{got} {want}");
    }
    let message = add_slice(&mut target, &term[1..]).unwrap_err().to_string();
    assert_eq!(message, "add_slice: term must be [40001], got [40000]");
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
