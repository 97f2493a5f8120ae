//! Loops of the rotary embedding.

use rayon::prelude::*;

use crate::element::Element;
use crate::simd::{fma, simd_fn};
use crate::view::rows_per_task;

pub(super) fn rotate<E: Element>(
    x: &mut [E],
    width: usize,
    heads: usize,
    head_dim: usize,
    half: usize,
    cos: &[f32],
    sin: &[f32],
    positions: &[u32],
    inverse: bool,
) {
    if width == 0 {
        return;
    }
    let rows = rows_per_task(width);
    x.par_chunks_mut(rows * width).zip(positions.par_chunks(rows)).for_each(|(x, positions)| {
        for (row, &position) in x.chunks_exact_mut(width).zip(positions) {
            let start = position as usize * half;
            let (cos, sin) = (&cos[start..start + half], &sin[start..start + half]);
            rotate_heads(&mut row[..heads * head_dim], head_dim, cos, sin, if inverse { -1.0 } else { 1.0 });
        }
    });
}

simd_fn! {
    fn rotate_heads<E: Element>(row: &mut [E], head_dim: usize, cos: &[f32], sin: &[f32], sign: f32) = rotate_heads_body;
}

#[inline(always)]
fn rotate_heads_body<E: Element, const FMA: bool>(row: &mut [E], head_dim: usize, cos: &[f32], sin: &[f32], sign: f32) {
    let half = cos.len();
    let sin = &sin[..half];
    for head in row.chunks_exact_mut(head_dim) {
        let (first, rest) = head.split_at_mut(half);
        let second = &mut rest[..half];
        for i in 0..half {
            let (a, b, s) = (first[i].wide(), second[i].wide(), sign * sin[i]);
            first[i] = E::narrow(fma::<FMA>(a, cos[i], -(b * s)));
            second[i] = E::narrow(fma::<FMA>(b, cos[i], a * s));
        }
    }
}
