//! Rows taken out and put back.

mod common;

use common::{random, rows, with_threads};
use tandem_kernels::Error;
use tandem_kernels::rows::{spread_rows, take_rows};
use tandem_kernels::slice::{to_bf16, to_f32};

/// For widths of less and more than a task, in both formats.
#[test]
fn taken_rows_are_those_and_come_back_between_zeros() {
    for (tokens, width) in [(1, 1), (50, 3), (700, 96), (5, 20_000)] {
        let x = to_f32(&to_bf16(&random(&[tokens, width], 1)).unwrap()).unwrap();
        let some: Vec<u32> = (0..tokens as u32).filter(|row| row % 7 < 3 && row / 100 != 2).collect();
        for x in [x.clone(), to_bf16(&x).unwrap()] {
            let taken = with_threads(3, || take_rows(&x, &some)).unwrap();
            let back = with_threads(3, || spread_rows(&taken, &some, tokens)).unwrap();
            assert_eq!((taken.dtype(), back.dtype()), (x.dtype(), x.dtype()));
            let [x, taken, back] = [&x, &taken, &back].map(|tensor| rows(&to_f32(tensor).unwrap()));
            for (at, row) in some.iter().enumerate() {
                assert_eq!(taken[at], x[*row as usize]);
            }
            for (row, back) in back.iter().enumerate() {
                let zeros = vec![0.0; width];
                assert_eq!(back, if some.contains(&(row as u32)) { &x[row] } else { &zeros }, "row {row}");
            }
        }
    }
    assert_eq!(take_rows(&random(&[4, 3], 1), &[]).unwrap().dims(), [0, 3]);
    assert_eq!(take_rows(&random(&[4, 3], 1), &[2, 2, 0]).unwrap().dims(), [3, 3]);
}

#[test]
fn refuses_rows_that_do_not_fit() {
    let x = random(&[4, 3], 1);
    assert!(matches!(take_rows(&x, &[1, 4]), Err(Error::Index { index: 4, limit: 4, .. })));
    assert!(matches!(spread_rows(&x, &[0, 1, 2, 4], 4), Err(Error::Index { index: 4, limit: 4, .. })));
    assert!(matches!(spread_rows(&x, &[0, 2, 2, 3], 9), Err(Error::Shape { what: "rows", .. })));
    assert!(matches!(spread_rows(&x, &[0, 1], 9), Err(Error::Shape { what: "dy", .. })));
    assert!(matches!(take_rows(&x.flatten_all().unwrap(), &[0]), Err(Error::Shape { what: "x", .. })));
}
