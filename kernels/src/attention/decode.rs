//! Attention of single rows against the cache: the forward's arithmetic, reading blocks that are already packed.
//!
//! A step reads all keys and values of all sequences once: it is memory that takes the time. So a task reads the blocks
//! of all its heads in the order in which they lie, asks for what comes next while it works, and stores a new key and
//! value itself, where they are read next.

use std::ops::Range;

use candle_core::Tensor;
use rayon::prelude::*;

use super::cache::Blocks;
use super::forward::block_range;
use super::kernels::Kernels;
use super::layout::{Scratch, halves};
use super::running::{Query, Running};
use super::{AttentionSpec, BLOCK_KEYS, KvCacheLayer};
use crate::element::{Element, with_element};
use crate::error::check_dims;
use crate::prefetch::prefetch;
use crate::profile::{Class, time};
use crate::view::{tensor, view_of};
use crate::{Error, Result};

/// Attention of the query heads of `qkv [R, (H + 2K) D]` (rotated) against the cache; returns `o [R, H D]`.
///
/// Row `r` stands at position `len - 1` of its slot, `rows[r] = (slot, len)`, and sees the first `len` keys (fewer with
/// a window), its own included: [`KvCacheLayer::append`] comes first. A slot may appear in several rows, as when a prompt
/// is read in pieces. The result is that of [`super::attention`] on the whole sequence, bit for bit. The cache has the dtype of `qkv`, which is that of `o`.
///
/// # Errors
/// [`Error::Index`] if a slot does not exist or `len` exceeds the cache; else if a shape, dtype, device or the mask does
/// not fit.
pub fn decode_attention(
    qkv: &Tensor,
    cache: &KvCacheLayer,
    rows: &[(usize, usize)],
    spec: &AttentionSpec,
) -> Result<Tensor> {
    attend("decode_attention", qkv, cache, rows, spec, false)
}

/// [`KvCacheLayer::append`] of every row, at position `len - 1` of its slot, and [`decode_attention`], in one pass over the
/// cache: a step of decoding. Every row has a slot of its own.
///
/// # Errors
/// As [`decode_attention`], and if two rows have one slot.
pub fn append_decode_attention(
    qkv: &Tensor,
    cache: &KvCacheLayer,
    rows: &[(usize, usize)],
    spec: &AttentionSpec,
) -> Result<Tensor> {
    const OP: &str = "append_decode_attention";
    let mut slots: Vec<usize> = rows.iter().map(|row| row.0).collect();
    slots.sort_unstable();
    if let Some(pair) = slots.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Error::shape(OP, "slots", "one row for each", format!("two rows for slot {}", pair[0])));
    }
    attend(OP, qkv, cache, rows, spec, true)
}

fn attend(
    op: &'static str,
    qkv: &Tensor,
    cache: &KvCacheLayer,
    rows: &[(usize, usize)],
    spec: &AttentionSpec,
    appends: bool,
) -> Result<Tensor> {
    let _timer =
        time(Class::AttentionDecode, 4 * spec.heads * spec.head_dim * rows.iter().map(|row| row.1).sum::<usize>());
    spec.check(op)?;
    if !spec.causal {
        return Err(Error::shape(op, "mask", "causal", spec));
    }
    check_dims(op, "qkv", &[rows.len(), spec.qkv_width()], qkv.dims())?;
    cache.check_spec(op, spec)?;
    for &(slot, len) in rows {
        cache.check_slot(op, slot)?;
        if len == 0 || len > cache.max_len() {
            return Err(Error::Index { op, what: "visible length", index: len, limit: cache.max_len() + 1 });
        }
    }
    with_element!(op, qkv.dtype(), E => {
        let mut o = vec![E::narrow(0.0); rows.len() * spec.output_width()];
        let qkv = view_of::<E>(op, qkv)?;
        cache.with_blocks::<E, _>(op, appends, |blocks| {
            let step = Step { qkv: &qkv, blocks, rows, spec, appends };
            step.run(&mut o);
        })?;
        tensor(o, (rows.len(), spec.output_width()))
    })
}

/// What a call works on.
pub(super) struct Step<'a, E> {
    pub(super) qkv: &'a [E],
    pub(super) blocks: &'a Blocks<'a, E>,
    /// Slot and visible length of each row.
    pub(super) rows: &'a [(usize, usize)],
    pub(super) spec: &'a AttentionSpec,
    /// Whether rows are stored before they are attended.
    appends: bool,
}

/// Some key-value heads of one row.
#[derive(Clone, Debug)]
pub(super) struct Span {
    pub(super) row: usize,
    pub(super) heads: Range<usize>,
}

/// Keys times head width from which on a thread of its own pays.
const TASK: usize = 1 << 14;

impl<E: Kernels> Step<'_, E> {
    /// Attends every row, in tasks of about as many keys.
    fn run(&self, o: &mut [E]) {
        let (spec, threads) = (self.spec, rayon::current_num_threads());
        let keys = |row: usize| {
            let (from, to) = self.visible(row);
            // A row costs something whatever it sees.
            to - from + BLOCK_KEYS / 2
        };
        let all: usize = (0..self.rows.len()).map(|row| keys(row) * spec.kv_heads).sum();
        let wanted = if threads == 1 { 1 } else { (all * spec.head_dim / TASK).clamp(1, 2 * threads) };
        let (mut tasks, mut spans, mut rest) = (Vec::new(), Vec::new(), o);
        let (mut done, mut width) = (0, 0);
        for row in 0..self.rows.len() {
            let mut first = 0;
            for head in 0..spec.kv_heads {
                done += keys(row);
                width += spec.group() * spec.head_dim;
                let is_full = done * wanted >= (tasks.len() + 1) * all;
                if is_full || head + 1 == spec.kv_heads {
                    spans.push(Span { row, heads: first..head + 1 });
                    first = head + 1;
                }
                if is_full {
                    let (o, tail) = std::mem::take(&mut rest).split_at_mut(width);
                    tasks.push((std::mem::take(&mut spans), o));
                    (rest, width) = (tail, 0);
                }
            }
        }
        if tasks.len() == 1 {
            tasks.into_iter().for_each(|(spans, o)| E::decode(self, &spans, o));
        } else {
            tasks.into_par_iter().for_each(|(spans, o)| E::decode(self, &spans, o));
        }
    }

    /// The keys that a row sees.
    pub(super) fn visible(&self, row: usize) -> (usize, usize) {
        let len = self.rows[row].1;
        self.spec.visible(len - 1, len)
    }

    /// The blocks that a row sees keys of.
    pub(super) fn seen(&self, row: usize) -> Range<usize> {
        let (from, to) = self.visible(row);
        from / BLOCK_KEYS..to.div_ceil(BLOCK_KEYS)
    }

    /// The query heads that share a row's key-value head, side by side.
    pub(super) fn queries(&self, row: usize, head: usize) -> &[E] {
        let width = self.spec.group() * self.spec.head_dim;
        &self.qkv[row * self.spec.qkv_width() + head * width..][..width]
    }

    /// Keys of one block of a row's head.
    pub(super) fn keys(&self, row: usize, head: usize, n: usize) -> &[E] {
        self.blocks.keys(self.rows[row].0, head, n)
    }

    /// Values of one block of a row's head.
    pub(super) fn values(&self, row: usize, head: usize, n: usize) -> &[E] {
        self.blocks.values(self.rows[row].0, head, n)
    }

    /// The keys of block `n` that a row sees, counted from the block's start.
    pub(super) fn range(&self, row: usize, n: usize) -> (usize, usize) {
        let (from, to) = self.visible(row);
        block_range(from, to, n * BLOCK_KEYS)
    }

    /// Stores the keys and values of a span, if they are not there yet. Called by the one task of the span, before it reads.
    pub(super) fn store(&self, span: &Span) {
        if !self.appends {
            return;
        }
        let (spec, (slot, len)) = (self.spec, self.rows[span.row]);
        let row = &self.qkv[span.row * spec.qkv_width()..][..spec.qkv_width()];
        for head in span.heads.clone() {
            let columns = [spec.heads + head, spec.heads + spec.kv_heads + head].map(|head| head * spec.head_dim);
            // SAFETY: the cache is locked for writing where rows are appended; the rows have different slots, and each
            // head of a row is in one span.
            unsafe { self.blocks.store(slot, head, len - 1, row, columns) };
        }
    }

    /// Asks for what a task reads after the values of block `n` of `head` of span `at`: the keys of that head in the next
    /// block, or of the next span, along with the places of its new key and value, which are written before.
    pub(super) fn prefetch_after(&self, spans: &[Span], at: usize, n: usize, head: usize) {
        let row = spans[at].row;
        if n + 1 < self.seen(row).end {
            return E::prefetch_keys(self.keys(row, head, n + 1), self.range(row, n + 1));
        }
        let Some(Span { row, heads }) = spans.get(at + 1) else { return };
        if !heads.contains(&head) {
            return;
        }
        let first = self.seen(*row).start;
        E::prefetch_keys(self.keys(*row, head, first), self.range(*row, first));
        self.prefetch_place(*row, head);
    }

    /// Asks for the places of a row's new key and value, if it is to be stored.
    pub(super) fn prefetch_place(&self, row: usize, head: usize) {
        if self.appends {
            let position = self.rows[row].1 - 1;
            let n = position / BLOCK_KEYS;
            E::prefetch_place(self.keys(row, head, n), self.values(row, head, n), position % BLOCK_KEYS);
        }
    }

    /// Asks for the values of a block that a row sees.
    pub(super) fn prefetch_values(&self, row: usize, head: usize, n: usize) {
        prefetch(halves(self.values(row, head, n), self.range(row, n)));
    }
}

/// The kernel of [`decode_attention`] on register tiles: the heads of `spans`, one after the other in `o`.
pub(super) fn decode<E: Kernels>(step: &Step<'_, E>, spans: &[Span], o: &mut [E]) {
    let (spec, group, head_dim) = (step.spec, step.spec.group(), step.spec.head_dim);
    let mut running: Vec<Running> = (0..spec.kv_heads).map(|_| Running::new(group, spec)).collect();
    let (mut scratch, mut wide) = (Scratch::default(), vec![0.0; spec.output_width()]);
    let mut o = o.chunks_exact_mut(head_dim);
    for (at, span) in spans.iter().enumerate() {
        step.store(span);
        let (start, end) = step.visible(span.row);
        for head in span.heads.clone() {
            let wide = wide[head * group * head_dim..].iter_mut();
            wide.zip(step.queries(span.row, head)).for_each(|(wide, value)| *wide = value.wide());
            running[head].start();
        }
        let queries: Vec<Query> = wide.chunks_exact(head_dim).map(|q| Query { q, start, end }).collect();
        for n in step.seen(span.row) {
            for head in span.heads.clone() {
                step.prefetch_after(spans, at, n, head);
                if head + 1 < span.heads.end {
                    step.prefetch_values(span.row, head + 1, n);
                }
                let (keys, values) = (step.keys(span.row, head, n), step.values(span.row, head, n));
                let (keys, values) = E::widen(keys, values, head_dim, &mut scratch);
                running[head].attend(&queries[head * group..][..group], n, keys, values, spec.scale);
            }
        }
        for running in &running[span.heads.clone()] {
            for (row, o) in o.by_ref().take(group).enumerate() {
                running.finish(row, o);
            }
        }
    }
}
