//! Dropout: a mask that is a pure function of its address, with the right rate.

mod common;

use common::{assert_close, bits, flat, random, rows, tensor, with_threads, zeros};
use tandem_kernels::dropout::{dropout, dropout_columns};
use tandem_kernels::rng::{Philox, Purpose};
use tandem_kernels::slice::{to_bf16, to_f32};

#[test]
fn dropout_is_a_pure_function_of_the_address() {
    let philox = Philox::new(1, Purpose::Dropout, 5);
    let x = tensor(&[1.0; 40 * 103], &[40, 103]);
    let addresses: Vec<(u64, u32)> = (0..40).map(|t| (t / 7, (t % 7) as u32)).collect();
    let y = dropout(&x, 0.3, &philox, 2, &addresses).unwrap();
    // Alone, on other threads, and on the gradient: the same mask.
    let alone = dropout(&tensor(&[1.0; 103], &[1, 103]), 0.3, &philox, 2, &addresses[17..18]).unwrap();
    assert_eq!(bits(&alone), bits(&y.narrow(0, 17, 1).unwrap()));
    let threaded = with_threads(3, || dropout(&x, 0.3, &philox, 2, &addresses)).unwrap();
    assert_eq!(bits(&threaded), bits(&y));
    // Another site, step or sample: another mask.
    assert_ne!(bits(&dropout(&x, 0.3, &philox, 3, &addresses).unwrap()), bits(&y));
    let other = Philox::new(1, Purpose::Dropout, 6);
    assert_ne!(bits(&dropout(&x, 0.3, &other, 2, &addresses).unwrap()), bits(&y));
    assert_ne!(rows(&y)[0], rows(&y)[7]);
}

#[test]
fn columns_have_the_mask_of_the_whole_row() {
    let philox = Philox::new(3, Purpose::Dropout, 1);
    let addresses: Vec<(u64, u32)> = (0..9).map(|t| (t, 4)).collect();
    let whole = dropout(&tensor(&[1.0; 9 * 29], &[9, 29]), 0.4, &philox, 5, &addresses).unwrap();
    for (first, width) in [(0, 29), (4, 8), (5, 2), (6, 23), (7, 1), (29, 0)] {
        let part = tensor(&vec![1.0; 9 * width], &[9, width]);
        let part = dropout_columns(&part, first, 0.4, &philox, 5, &addresses).unwrap();
        let expected = whole.narrow(1, first, width).unwrap().contiguous().unwrap();
        assert_eq!(bits(&part), bits(&expected), "{width} columns from {first}");
    }
    let error = dropout_columns(&zeros(&[9, 2]), (4 << 16) - 1, 0.4, &philox, 5, &addresses);
    assert!(error.is_err(), "the whole row is too wide");
}

#[test]
fn dropout_keeps_the_mean() {
    let philox = Philox::new(7, Purpose::Dropout, 0);
    let n = 400 * 256;
    let x = tensor(&vec![1.0; n], &[400, 256]);
    let addresses: Vec<(u64, u32)> = (0..400).map(|t| (t, 0)).collect();
    for p in [0.1f32, 0.5] {
        let y = flat(&dropout(&x, p, &philox, 0, &addresses).unwrap());
        let dropped = y.iter().filter(|v| **v == 0.0).count() as f64 / n as f64;
        // Five standard deviations of a binomial.
        let bound = 5.0 * (p as f64 * (1.0 - p as f64) / n as f64).sqrt();
        assert!((dropped - p as f64).abs() < bound, "p {p}: dropped {dropped}");
        let kept: Vec<f32> = y.into_iter().filter(|v| *v != 0.0).collect();
        assert_close(&kept, &vec![1.0 / (1.0 - p as f64); kept.len()], 1e-6, "kept");
    }
    assert_eq!(bits(&dropout(&x, 0.0, &philox, 0, &addresses).unwrap()), bits(&x));
    assert!(dropout(&x, 1.0, &philox, 0, &addresses).is_err());
    assert!(dropout(&zeros(&[3, 4]), 0.1, &philox, 0, &addresses).is_err());
}

#[test]
fn bf16_has_the_masks_of_f32_and_one_rounding() {
    let philox = Philox::new(1, Purpose::Dropout, 5);
    let x = to_bf16(&random(&[40, 103], 9)).unwrap();
    let addresses: Vec<(u64, u32)> = (0..40).map(|t| (t / 7, (t % 7) as u32)).collect();
    for first in [0, 3] {
        let y = dropout_columns(&x, first, 0.3, &philox, 2, &addresses).unwrap();
        let exact = dropout_columns(&to_f32(&x).unwrap(), first, 0.3, &philox, 2, &addresses).unwrap();
        assert_eq!(bits(&to_f32(&y).unwrap()), bits(&to_f32(&to_bf16(&exact).unwrap()).unwrap()));
    }
    let whole = dropout(&x, 0.0, &philox, 2, &addresses).unwrap();
    assert_eq!(bits(&to_f32(&whole).unwrap()), bits(&to_f32(&x).unwrap()));
}

#[test]
fn columns_take_four_to_a_draw() {
    let philox = Philox::new(5, Purpose::Dropout, 3);
    let (site, p) = (6u16, 0.4f32);
    let threshold = (f64::from(p) * 2f64.powi(32)) as u32;
    for (first, width) in [(0, 64), (0, 203), (3, 130), (5, 64), (62, 3)] {
        let ones = tensor(&vec![1.0; width], &[1, width]);
        let y = flat(&dropout_columns(&ones, first, p, &philox, site, &[(9, 17)]).unwrap());
        for (i, y) in y.iter().enumerate() {
            let column = (first + i) as u32;
            let bits = philox.block(9, 17, (u32::from(site) << 16) + column / 4)[column as usize % 4];
            assert_eq!(*y == 0.0, bits < threshold, "column {i} from {first}");
        }
    }
}
