//! Loop of the dropout.

use rayon::prelude::*;

use crate::rng::Philox;
use crate::simd::simd_fn;
use crate::view::rows_per_task;

pub(super) fn dropout(
    x: &[f32],
    width: usize,
    first: usize,
    p: f32,
    philox: &Philox,
    site: u16,
    rows: &[(u64, u32)],
    y: &mut [f32],
) {
    if width == 0 {
        return;
    }
    let threshold = (p as f64 * 2f64.powi(32)) as u32;
    let scale = 1.0 / (1.0 - p);
    let count = rows_per_task(width);
    let inputs = x.par_chunks(count * width).zip(rows.par_chunks(count));
    y.par_chunks_mut(count * width).zip(inputs).for_each(|(y, (x, rows))| {
        for ((y, x), &address) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(rows) {
            drop_row(x, first, threshold, scale, philox, site, address, y);
        }
    });
}

simd_fn! {
    fn drop_row(
        x: &[f32], first: usize, threshold: u32, scale: f32, philox: &Philox, site: u16, address: (u64, u32), y: &mut [f32],
    ) = drop_row_body;
}

#[inline(always)]
fn drop_row_body<const FMA: bool>(
    x: &[f32],
    first: usize,
    threshold: u32,
    scale: f32,
    philox: &Philox,
    site: u16,
    (sample, position): (u64, u32),
    y: &mut [f32],
) {
    // Four columns to a draw; the first draw may have begun before the first column.
    let (base, skip) = ((u32::from(site) << 16) + (first / 4) as u32, first % 4);
    let head = if skip == 0 { 0 } else { (4 - skip).min(x.len()) };
    let (x_head, x) = x.split_at(head);
    let (y_head, y) = y.split_at_mut(head);
    if head > 0 {
        let bits = philox.block(sample, position, base);
        for ((y, x), &bits) in y_head.iter_mut().zip(x_head).zip(&bits[skip..]) {
            *y = if bits < threshold { 0.0 } else { x * scale };
        }
    }
    for (block, (y, x)) in (base + u32::from(skip > 0)..).zip(y.chunks_mut(4).zip(x.chunks(4))) {
        let bits = philox.block(sample, position, block);
        for ((y, x), bits) in y.iter_mut().zip(x).zip(bits) {
            *y = if bits < threshold { 0.0 } else { x * scale };
        }
    }
}
