//! Loop of the dropout.

use rayon::prelude::*;

use crate::element::Element;
use crate::rng::Philox;
use crate::simd::simd_fn;
use crate::view::{Output, rows_per_task};

/// Columns whose draws are computed at once, in vectors.
const GROUP: usize = 64;

pub(super) fn dropout<E: Element>(
    x: &[E],
    width: usize,
    first: usize,
    p: f32,
    philox: &Philox,
    site: u16,
    rows: &[(u64, u32)],
    y: &mut Output<E>,
) {
    if width == 0 {
        return;
    }
    let threshold = (p as f64 * 2f64.powi(32)) as u32;
    let scale = 1.0 / (1.0 - p);
    let count = rows_per_task(width);
    let inputs = x.par_chunks(count * width).zip(rows.par_chunks(count));
    y.chunks(count * width).zip(inputs).for_each(|(y, (x, rows))| {
        for ((y, x), &address) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(rows) {
            drop_row(x, first, threshold, scale, philox, site, address, y);
        }
    });
}

simd_fn! {
    fn drop_row<E: Element>(
        x: &[E], first: usize, threshold: u32, scale: f32, philox: &Philox, site: u16, address: (u64, u32), y: &mut [E],
    ) = drop_row_body;
}

#[inline(always)]
fn drop_row_body<E: Element, const FMA: bool>(
    x: &[E],
    first: usize,
    threshold: u32,
    scale: f32,
    philox: &Philox,
    site: u16,
    (sample, position): (u64, u32),
    y: &mut [E],
) {
    // Four columns to a draw; the first draw may have begun before the first column.
    let (base, skip) = ((u32::from(site) << 16) + (first / 4) as u32, first % 4);
    let head = if skip == 0 { 0 } else { (4 - skip).min(x.len()) };
    let (x_head, x) = x.split_at(head);
    let (y_head, y) = y.split_at_mut(head);
    if head > 0 {
        let bits = philox.block(sample, position, base);
        for ((y, x), &bits) in y_head.iter_mut().zip(x_head).zip(&bits[skip..]) {
            *y = E::narrow(if bits < threshold { 0.0 } else { x.wide() * scale });
        }
    }
    let start = base + u32::from(skip > 0);
    let ((x_groups, x), (y_groups, y)) = (x.as_chunks::<GROUP>(), y.as_chunks_mut::<GROUP>());
    for ((y, x), first) in y_groups.iter_mut().zip(x_groups).zip((start..).step_by(GROUP / 4)) {
        let words = philox.blocks::<{ GROUP / 4 }>(sample, position, first);
        let mut bits = [0; GROUP];
        for (block, bits) in bits.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            *bits = words.map(|word| word[block]);
        }
        for i in 0..GROUP {
            y[i] = E::narrow(if bits[i] < threshold { 0.0 } else { x[i].wide() * scale });
        }
    }
    let start = start.wrapping_add((x_groups.len() * GROUP / 4) as u32);
    for (block, (y, x)) in (start..).zip(y.chunks_mut(4).zip(x.chunks(4))) {
        let bits = philox.block(sample, position, block);
        for ((y, x), bits) in y.iter_mut().zip(x).zip(bits) {
            *y = E::narrow(if bits < threshold { 0.0 } else { x.wide() * scale });
        }
    }
}
