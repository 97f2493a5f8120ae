//! Lookup, its scatter backward, learned positions, and dropout.

mod common;

use common::{assert_close, bits, flat, random, rows, tensor, with_threads, zeros};
use tandem_kernels::Error;
use tandem_kernels::dropout::dropout;
use tandem_kernels::embedding::{add_rows, embedding, embedding_backward};
use tandem_kernels::rng::{Philox, Purpose};

#[test]
fn gathers_rows() {
    for width in [1, 3, 64] {
        let table = random(&[11, width], 1);
        let ids = [3, 0, 10, 3, 7];
        let y = rows(&embedding(&table, &ids).unwrap());
        let table = rows(&table);
        for (y, id) in y.iter().zip(ids) {
            assert_eq!(*y, table[id as usize]);
        }
    }
    assert_eq!(embedding(&random(&[11, 4], 1), &[]).unwrap().dims(), [0, 4]);
}

#[test]
fn scatter_adds_in_token_order() {
    let (vocabulary, width, tokens) = (50, 9, 400);
    let ids: Vec<u32> = (0..tokens as u32).map(|t| (t * t * 7 + 3) % 41).collect();
    let (dy, start) = (random(&[tokens, width], 2), random(&[vocabulary, width], 3));
    let run = |threads| {
        let dtable = start.copy().unwrap();
        with_threads(threads, || embedding_backward(&dy, &ids, &dtable)).unwrap();
        dtable
    };
    let got = run(1);
    assert_eq!(bits(&got), bits(&run(3)));
    let mut want = rows(&start);
    for (id, dy) in ids.iter().zip(rows(&dy)) {
        for (want, dy) in want[*id as usize].iter_mut().zip(dy) {
            *want += dy;
        }
    }
    assert_eq!(flat(&got), want.concat());
}

#[test]
fn learned_positions_are_added() {
    let (x, table) = (random(&[4, 5], 1), random(&[8, 5], 2));
    let before = rows(&x);
    add_rows(&x, &table, &[7, 0, 1, 7]).unwrap();
    for ((after, before), position) in rows(&x).iter().zip(before).zip([7, 0, 1, 7]) {
        for i in 0..5 {
            assert_eq!(after[i], before[i] + rows(&table)[position][i]);
        }
    }
}

#[test]
fn ids_out_of_range_are_errors() {
    let table = random(&[11, 4], 1);
    assert!(matches!(embedding(&table, &[1, 11]), Err(Error::Index { index: 11, limit: 11, .. })));
    let dy = random(&[1, 4], 2);
    assert!(matches!(embedding_backward(&dy, &[12], &table), Err(Error::Index { index: 12, .. })));
    assert!(matches!(add_rows(&dy, &table, &[99]), Err(Error::Index { index: 99, .. })));
    assert!(embedding_backward(&dy, &[1, 2], &table).is_err());
}

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
