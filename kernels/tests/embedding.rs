//! Lookup, its scatter backward, and learned positions.

mod common;

use candle_core::Tensor;
use common::{bits, flat, random, rows, with_threads, zeros};
use tandem_kernels::Error;
use tandem_kernels::embedding::{add_rows, embedding, embedding_backward, embedding_shard, embedding_shard_backward};
use tandem_kernels::slice::{to_bf16, to_f32};

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

/// Ids that repeat, some often, some once, and some of 50 never.
fn repeated_ids(tokens: u32) -> Vec<u32> {
    (0..tokens).map(|t| (t * t * 7 + 3) % 41).collect()
}

#[test]
fn scatter_adds_the_sum_in_token_order() {
    for width in [1, 9, 64, 130] {
        let (vocabulary, tokens) = (50, 400);
        let ids = repeated_ids(tokens as u32);
        let (dy, start) = (random(&[tokens, width], 2), random(&[vocabulary, width], 3));
        let run = |threads| {
            let dtable = start.copy().unwrap();
            with_threads(threads, || embedding_backward(&dy, &ids, &dtable)).unwrap();
            dtable
        };
        let got = run(1);
        assert_eq!(bits(&got), bits(&run(3)));
        let mut sums = vec![vec![0f32; width]; vocabulary];
        for (id, dy) in ids.iter().zip(rows(&dy)) {
            for (sum, dy) in sums[*id as usize].iter_mut().zip(dy) {
                *sum += dy;
            }
        }
        let want: Vec<f32> = flat(&start).iter().zip(sums.concat()).map(|(start, sum)| start + sum).collect();
        assert_eq!(flat(&got), want);
    }
}

/// Two gradients in tables of their own, added later, have the bits of one table: the other term may be any table.
#[test]
fn partial_tables_add_up_to_one() {
    let (ids, dy, start) = (repeated_ids(300), random(&[300, 7], 4), random(&[50, 7], 5));
    let one = start.copy().unwrap();
    embedding_backward(&dy, &ids, &one).unwrap();
    let apart = zeros(&[50, 7]);
    embedding_backward(&dy, &ids, &apart).unwrap();
    assert_eq!(bits(&one), bits(&(start + apart).unwrap()));
}

#[test]
fn shards_look_up_and_scatter_their_own_rows() {
    let (vocabulary, width) = (50, 9);
    let ids = repeated_ids(300);
    let (table, dy, start) =
        (random(&[vocabulary, width], 1), random(&[300, width], 2), random(&[vocabulary, width], 3));
    let whole = embedding(&table, &ids).unwrap();
    let want = start.copy().unwrap();
    embedding_backward(&dy, &ids, &want).unwrap();
    for cuts in [vec![0, 50], vec![0, 16, 50], vec![0, 0, 16, 32, 50, 50]] {
        let (mut sum, mut gradients) = (zeros(&[300, width]), Vec::new());
        for range in cuts.windows(2) {
            let part = |t: &Tensor| t.narrow(0, range[0], range[1] - range[0]).unwrap().copy().unwrap();
            let y = embedding_shard(&part(&table), range[0], &ids).unwrap();
            for (id, row) in ids.iter().zip(rows(&y)) {
                let inside = (range[0]..range[1]).contains(&(*id as usize));
                assert!(inside || row.iter().all(|&value| value == 0.0), "{cuts:?}");
            }
            sum = (sum + y).unwrap();
            let dtable = part(&start);
            embedding_shard_backward(&dy, &ids, range[0], &dtable).unwrap();
            gradients.extend(bits(&dtable));
        }
        assert_eq!(bits(&sum), bits(&whole), "{cuts:?}");
        assert_eq!(gradients, bits(&want), "{cuts:?}");
    }
    assert!(embedding_shard(&random(&[4], 1), 0, &ids).is_err());
    assert!(embedding_shard_backward(&dy, &ids[1..], 0, &start).is_err());
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
fn bf16_tables_give_f32_rows() {
    for width in [1, 9, 130] {
        let (table, ids) = (to_bf16(&random(&[50, width], 1)).unwrap(), repeated_ids(300));
        let exact = to_f32(&table).unwrap();
        let rows = embedding(&table, &ids).unwrap();
        assert_eq!(bits(&rows), bits(&embedding(&exact, &ids).unwrap()));
        let shard = |t: &Tensor| embedding_shard(&t.narrow(0, 16, 20).unwrap(), 16, &ids).unwrap();
        assert_eq!(bits(&shard(&table)), bits(&shard(&exact)));
        let sums = [&table, &exact].map(|table| {
            let sum = random(&[300, width], 2);
            add_rows(&sum, table, &ids).unwrap();
            bits(&sum)
        });
        assert_eq!(sums[0], sums[1]);
        assert!(add_rows(&to_bf16(&rows).unwrap(), &table, &ids).is_err(), "the residual stream is f32");
        assert!(embedding_backward(&to_bf16(&rows).unwrap(), &ids, &exact).is_err(), "gradients are f32");
    }
}
