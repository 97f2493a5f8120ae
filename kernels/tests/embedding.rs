//! Lookup, its scatter backward, and learned positions.

mod common;

use common::{bits, flat, random, rows, with_threads};
use tandem_kernels::Error;
use tandem_kernels::embedding::{add_rows, embedding, embedding_backward};

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
