//! The three products of a head, in the element type of its weights; logits and sums are f32 always.

use ::half::bf16;
use rayon::prelude::*;

use super::cpu::{Head, RowGrads};
use super::row::HeadPartial;
use super::{full, half};
use crate::element::Element;
use crate::gemm::{Factor, Gemm, Operand, Output, Product, Right, Start, gemm, multiply};
use crate::simd::simd_fn;

/// An element type of hidden rows and weights.
pub(super) trait HeadElement: Element {
    /// `logits [rows, n] = h [rows, width] · wᵀ + bias`, `w [n, width]`: the bits of [`crate::gemm::linear_f32`].
    fn logits(h: &[Self], w: &[Self], bias: Option<&[f32]>, width: usize, logits: &mut [f32]);

    /// Elements of the copy of a tile in this type that [`HeadElement::rows`] needs.
    fn copy_len(tile: usize) -> usize;

    /// Runs `pass` on every row of a tile, `n` wide, and rounds the result into `copy`.
    fn rows(tile: &mut [f32], n: usize, copy: &mut [Self], pass: impl Fn(usize, &mut [f32]) + Sync + Send);

    /// What [`HeadElement::rows`] made, in this type.
    fn rounded<'a>(tile: &'a [f32], copy: &'a [Self]) -> &'a [Self];

    /// `dw [n, width] += dlᵀ · h`, `dl [rows, n]`, `h [rows, width]`.
    fn weight_grad(dl: &[Self], h: &[Self], width: usize, dw: &mut [f32]);

    /// `dh [rows, width] += dl · w`, `dl [rows, n]`, `w [n, width]`.
    fn input_grad(dl: &[Self], w: &[Self], width: usize, dh: &mut [f32]);

    /// The forward in tasks that use logits while they are in cache, where there are rows enough for that.
    fn fused_forward(_: &Head<Self>, _: &[Self], _: &[u32]) -> Option<Vec<HeadPartial>> {
        None
    }

    /// The backward likewise, without the gradient of the bias.
    fn fused_backward(_: &Head<Self>, _: &[Self], _: &RowGrads, _: Option<&mut [f32]>) -> Option<Vec<f32>> {
        None
    }

    /// Both for a known gradient of the log-probabilities, from logits that are made once. Adds to the gradient of the weights,
    /// and returns what was seen of each row and the gradient of the rows.
    fn fused_both(
        _: &Head<Self>,
        _: &[Self],
        _: &[u32],
        _: &[f32],
        _: &mut [f32],
    ) -> Option<(Vec<HeadPartial>, Vec<f32>)> {
        None
    }
}

impl HeadElement for f32 {
    fn logits(h: &[f32], w: &[f32], bias: Option<&[f32]>, width: usize, logits: &mut [f32]) {
        let n = w.len() / width;
        if let Some(bias) = bias {
            logits.chunks_mut(n).for_each(|row| row.copy_from_slice(bias));
        }
        gemm(Gemm {
            m: h.len() / width,
            n,
            k: width,
            a: h,
            a_row_stride: width,
            a_col_stride: 1,
            b: Right::Strided(w, (1, width)),
            c: Output::new(logits),
            c_row_stride: n,
            accumulate: bias.is_some(),
        });
    }

    fn copy_len(_: usize) -> usize {
        0
    }

    fn rows(tile: &mut [f32], n: usize, _: &mut [f32], pass: impl Fn(usize, &mut [f32]) + Sync + Send) {
        tile.par_chunks_mut(n).enumerate().for_each(|(row, logits)| pass(row, logits));
    }

    fn rounded<'a>(tile: &'a [f32], _: &'a [f32]) -> &'a [f32] {
        tile
    }

    fn weight_grad(dl: &[f32], h: &[f32], width: usize, dw: &mut [f32]) {
        let (rows, n) = (h.len() / width, dw.len() / width);
        gemm(Gemm {
            m: n,
            n: width,
            k: rows,
            a: dl,
            a_row_stride: 1,
            a_col_stride: n,
            b: Right::Strided(h, (width, 1)),
            c: Output::new(dw),
            c_row_stride: width,
            accumulate: true,
        });
    }

    fn input_grad(dl: &[f32], w: &[f32], width: usize, dh: &mut [f32]) {
        let (rows, n) = (dh.len() / width, w.len() / width);
        gemm(Gemm {
            m: rows,
            n: width,
            k: n,
            a: dl,
            a_row_stride: n,
            a_col_stride: 1,
            b: Right::Strided(w, (width, 1)),
            c: Output::new(dh),
            c_row_stride: width,
            accumulate: true,
        });
    }

    fn fused_forward(head: &Head<f32>, h: &[f32], labels: &[u32]) -> Option<Vec<HeadPartial>> {
        (labels.len() >= full::ENOUGH_ROWS).then(|| full::forward(head, h, labels))
    }

    fn fused_backward(head: &Head<f32>, h: &[f32], rows: &RowGrads, dw: Option<&mut [f32]>) -> Option<Vec<f32>> {
        (rows.labels.len() >= full::ENOUGH_ROWS).then(|| full::backward(head, h, rows, dw))
    }

    fn fused_both(
        head: &Head<f32>,
        h: &[f32],
        labels: &[u32],
        dlogp: &[f32],
        dw: &mut [f32],
    ) -> Option<(Vec<HeadPartial>, Vec<f32>)> {
        full::both(head, h, labels, dlogp, dw)
    }
}

impl HeadElement for bf16 {
    fn logits(h: &[bf16], w: &[bf16], bias: Option<&[f32]>, width: usize, logits: &mut [f32]) {
        multiply(Product {
            m: h.len() / width,
            n: w.len() / width,
            k: width,
            a: Operand::along_k(h, width),
            b: Factor::Plain(Operand::along_k(w, width)),
            start: bias.map_or(Start::Zero, Start::Bias),
            c: Output::new(logits),
        });
    }

    fn copy_len(tile: usize) -> usize {
        tile
    }

    fn rows(tile: &mut [f32], n: usize, copy: &mut [bf16], pass: impl Fn(usize, &mut [f32]) + Sync + Send) {
        tile.par_chunks_mut(n).zip(copy.par_chunks_mut(n)).enumerate().for_each(|(row, (logits, copy))| {
            pass(row, logits);
            round(logits, copy);
        });
    }

    fn rounded<'a>(_: &'a [f32], copy: &'a [bf16]) -> &'a [bf16] {
        copy
    }

    fn weight_grad(dl: &[bf16], h: &[bf16], width: usize, dw: &mut [f32]) {
        let (rows, n) = (h.len() / width, dw.len() / width);
        multiply(Product {
            m: n,
            n: width,
            k: rows,
            a: Operand::across_k(dl, n),
            b: Factor::Plain(Operand::across_k(h, width)),
            start: Start::Output,
            c: Output::new(dw),
        });
    }

    fn input_grad(dl: &[bf16], w: &[bf16], width: usize, dh: &mut [f32]) {
        let (rows, n) = (dh.len() / width, w.len() / width);
        multiply(Product {
            m: rows,
            n: width,
            k: n,
            a: Operand::along_k(dl, n),
            b: Factor::Plain(Operand::across_k(w, width)),
            start: Start::Output,
            c: Output::new(dh),
        });
    }

    fn fused_forward(head: &Head<bf16>, h: &[bf16], labels: &[u32]) -> Option<Vec<HeadPartial>> {
        (labels.len() >= half::ENOUGH_ROWS).then(|| half::forward(head, h, labels))
    }

    fn fused_backward(head: &Head<bf16>, h: &[bf16], rows: &RowGrads, dw: Option<&mut [f32]>) -> Option<Vec<f32>> {
        (rows.labels.len() >= half::ENOUGH_ROWS).then(|| half::backward(head, h, rows, dw))
    }
}

simd_fn! { fn round(from: &[f32], to: &mut [bf16]) = round_body; }

#[inline(always)]
fn round_body<const FMA: bool>(from: &[f32], to: &mut [bf16]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = bf16::narrow(*from);
    }
}
