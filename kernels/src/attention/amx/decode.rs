//! Decoding on tiles: the query heads that share keys are rows of one tile, which has no other rows.

use std::f32::consts::LOG2_E;

use half::bf16;

use super::super::decode::{Span, Step};
use super::super::layout::{HALF_KEYS, padded_pairs};
use super::forward::Running;
use super::product::Left;
use super::vector::{pack_some_rows, range_mask};
use super::{Head, Room};
use crate::amx::Tiles;

/// Most query heads that are worked on at once.
const ROWS: usize = 16;

/// Up to 16 of the query heads that share a key-value head.
struct Part {
    /// `[16, D padded]`.
    q: Room<bf16>,
    /// Query heads.
    rows: usize,
    running: Running<ROWS>,
}

/// The heads of `spans`, one after the other in `o`.
pub(in super::super) fn decode(step: &Step<'_, bf16>, spans: &[Span], o: &mut [bf16]) {
    // SAFETY: this path is taken only where the processor has tiles and their AVX-512.
    unsafe { attend(step, spans, o) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn attend(step: &Step<'_, bf16>, spans: &[Span], o: &mut [bf16]) {
    let (spec, head_dim, group) = (step.spec, step.spec.head_dim, step.spec.group());
    let rows = group.min(ROWS);
    let Some(tiles) = Tiles::with_left_rows(rows) else { unreachable!("the path of tiles without tiles") };
    let parts_of_head = group.div_ceil(ROWS);
    let new = |part: usize| Part {
        q: Room::new(ROWS * padded_pairs(head_dim)),
        rows: ROWS.min(group - part % parts_of_head * ROWS),
        running: Running::new(spec),
    };
    let mut parts: Vec<Part> = (0..spec.kv_heads * parts_of_head).map(new).collect();
    let mut o = o;
    for (at, span) in spans.iter().enumerate() {
        step.store(span);
        let parts = &mut parts[span.heads.start * parts_of_head..span.heads.end * parts_of_head];
        for (head, parts) in span.heads.clone().zip(parts.chunks_mut(parts_of_head)) {
            for (part, source) in parts.iter_mut().zip(step.queries(span.row, head).chunks(ROWS * head_dim)) {
                pack_some_rows(Head { source, width: head_dim, column: 0, head_dim }, &mut part.q);
                part.running.start();
            }
        }
        for n in step.seen(span.row) {
            let (from, to) = step.range(span.row, n);
            let (mask, halves) = (range_mask(from, to), from / HALF_KEYS..to.div_ceil(HALF_KEYS));
            // One stage for all heads after the other: of one head, each would wait for the one before.
            for (head, parts) in span.heads.clone().zip(parts.chunks_mut(parts_of_head)) {
                step.prefetch_values(span.row, head, n);
                let keys = step.keys(span.row, head, n);
                for part in parts {
                    let q = Left { values: &part.q, stride: part.q.len() / ROWS };
                    part.running.score(&tiles, q, keys, halves.clone());
                }
            }
            for part in parts.iter_mut() {
                (0..part.rows).for_each(|row| part.running.softmax(row, mask, spec.scale * LOG2_E));
            }
            for (head, parts) in span.heads.clone().zip(parts.chunks_mut(parts_of_head)) {
                step.prefetch_after(spans, at, n, head);
                let values = step.values(span.row, head, n);
                parts.iter_mut().for_each(|part| part.running.add_values(&tiles, values, halves.clone()));
            }
        }
        for parts in parts.chunks_mut(parts_of_head) {
            let (heads, rest) = o.split_at_mut(group * head_dim);
            for (part, heads) in parts.iter().zip(heads.chunks_mut(ROWS * head_dim)) {
                for (row, o) in heads.chunks_exact_mut(head_dim).enumerate() {
                    part.running.finish(row, o);
                }
            }
            o = rest;
        }
    }
}
