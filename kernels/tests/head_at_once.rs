//! The head with its backward at once gives the bits of the two one after the other, however many rows' logits it keeps.

mod common;

use candle_core::{DType, Tensor};
use common::{bits, random, with_threads, zeros};
use tandem_kernels::logprob::{head_logprob, head_logprob_backward, head_logprob_with_backward};

/// Rows, width and entries: too few rows; one chunk of rows; several; so many entries that chunks are smaller; too many.
const SHAPES: [(usize, usize, usize); 5] =
    [(200, 24, 1333), (300, 33, 1333), (1700, 20, 2048), (700, 8, 40_000), (300, 8, 70_000)];

fn dtypes() -> [DType; 2] {
    [DType::F32, DType::BF16]
}

#[test]
fn at_once_is_one_after_the_other() {
    for ((rows, width, entries), dtype) in SHAPES.into_iter().flat_map(|shape| dtypes().map(|dtype| (shape, dtype))) {
        let of = |sizes: &[usize], seed| random(sizes, seed).to_dtype(dtype).unwrap();
        let (h, w) = (of(&[rows, width], 1), of(&[entries, width], 2));
        let labels: Vec<u32> = (0..rows).map(|row| (row * 7919 % entries) as u32).collect();
        let (dlogp, before) = (random(&[rows], 3), random(&[entries, width], 4));
        let start = || (&zeros(&[entries, width]) + &before).unwrap();

        let dw = start();
        let out = head_logprob(&h, &w, None, &labels, 0.8).unwrap();
        let dh = head_logprob_backward(&dlogp, None, &h, &w, None, &labels, &out, &dw, None).unwrap();
        let apart: Vec<_> = [&out.logp, &out.entropy, &out.lse, &dh, &dw].map(bits).into();
        for threads in [1, 3] {
            let dw = start();
            let once = || head_logprob_with_backward(&dlogp, &h, &w, &labels, 0.8, &dw).unwrap();
            let (out, dh) = with_threads(threads, once);
            assert_eq!(out.inv_temperature, 0.8);
            let tensors: [&Tensor; 5] = [&out.logp, &out.entropy, &out.lse, &dh, &dw];
            for (place, (tensor, apart)) in tensors.into_iter().zip(&apart).enumerate() {
                assert!(bits(tensor) == *apart, "{rows} {width} {entries} {dtype:?} {threads} threads: {place}");
            }
        }
    }
}

#[test]
fn bad_input_is_refused() {
    let (h, w, dw) = (random(&[3, 4], 1), random(&[5, 4], 2), zeros(&[5, 4]));
    let message = |dlogp: &[usize], labels: &[u32], dw: &Tensor| {
        head_logprob_with_backward(&random(dlogp, 3), &h, &w, labels, 1.0, dw).unwrap_err().to_string()
    };
    assert!(message(&[3], &[0, 1, 5], &dw).contains("label 5 is out of range (limit 5)"));
    assert!(message(&[3], &[0, 1], &dw).contains("labels"));
    assert!(message(&[2], &[0, 1, 2], &dw).contains("dlogp"));
    assert!(message(&[3], &[0, 1, 2], &zeros(&[4, 4])).contains("dw"));
}
