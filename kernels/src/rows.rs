//! Some rows of a matrix, and a matrix of zeros but for some rows: where only part of a batch goes on.

use candle_core::Tensor;
use rayon::prelude::*;

use crate::element::{Element, with_element};
use crate::error::check_dims;
use crate::profile::{Class, time};
use crate::view::{Output, rows_per_task, view_of};
use crate::{Error, Result};

/// `y[n] = x[rows[n]]` for `x [T, d]`; returns `[N, d]` in the format of `x`.
///
/// # Errors
/// [`Error::Index`] if a row is T or more; else if the shape, dtype or device does not fit.
pub fn take_rows(x: &Tensor, rows: &[u32]) -> Result<Tensor> {
    let _timer = time(Class::Rows, 0);
    const OP: &str = "take_rows";
    let &[tokens, width] = x.dims() else { return Err(Error::shape(OP, "x", "[T, d]", x.dims())) };
    check_rows(OP, rows, tokens)?;
    with_element!(OP, x.dtype(), E => {
        let mut y = Output::<E>::new(rows.len() * width);
        take(&view_of::<E>(OP, x)?, width.max(1), rows, &mut y);
        y.into_tensor((rows.len(), width))
    })
}

/// The backward of [`take_rows`]: `dx[rows[n]] = dy[n]` for `dy [N, d]`, and zero in all other rows; returns `[tokens, d]` in the
/// format of `dy`.
///
/// # Errors
/// [`Error::Index`] if a row is `tokens` or more; if the rows do not ascend strictly; else if the shape, dtype or device does not
/// fit.
pub fn spread_rows(dy: &Tensor, rows: &[u32], tokens: usize) -> Result<Tensor> {
    let _timer = time(Class::Rows, 0);
    const OP: &str = "spread_rows";
    let &[_, width] = dy.dims() else { return Err(Error::shape(OP, "dy", "[N, d]", dy.dims())) };
    check_dims(OP, "dy", &[rows.len(), width], dy.dims())?;
    check_rows(OP, rows, tokens)?;
    if let Some(pair) = rows.windows(2).find(|pair| pair[0] >= pair[1]) {
        let got = format!("{} before {}", pair[0], pair[1]);
        return Err(Error::Shape { op: OP, what: "rows", expected: "strictly ascending".into(), got });
    }
    with_element!(OP, dy.dtype(), E => {
        let mut dx = Output::<E>::new(tokens * width);
        spread(&view_of::<E>(OP, dy)?, width.max(1), rows, &mut dx);
        dx.into_tensor((tokens, width))
    })
}

fn check_rows(op: &'static str, rows: &[u32], limit: usize) -> Result<()> {
    match rows.iter().find(|&&row| row as usize >= limit) {
        Some(&row) => Err(Error::Index { op, what: "row", index: row as usize, limit }),
        None => Ok(()),
    }
}

fn take<E: Element>(x: &[E], width: usize, rows: &[u32], y: &mut Output<E>) {
    let each = rows_per_task(width);
    y.chunks(each * width).zip(rows.par_chunks(each)).for_each(|(y, rows)| {
        for (y, &row) in y.chunks_exact_mut(width).zip(rows) {
            y.copy_from_slice(&x[row as usize * width..][..width]);
        }
    });
}

fn spread<E: Element>(dy: &[E], width: usize, rows: &[u32], dx: &mut Output<E>) {
    let each = rows_per_task(width);
    // A chunk begins with zeros.
    dx.chunks(each * width).enumerate().for_each(|(chunk, dx)| {
        let first = chunk * each;
        let from = rows.partition_point(|&row| (row as usize) < first);
        let here = rows[from..].iter().take_while(|&&row| (row as usize) < first + each);
        for (&row, dy) in here.zip(dy[from * width..].chunks_exact(width)) {
            dx[(row as usize - first) * width..][..width].copy_from_slice(dy);
        }
    });
}
