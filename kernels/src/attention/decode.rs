//! Attention of single rows against the cache: the forward's arithmetic, reading blocks that are already packed.

use candle_core::Tensor;
use rayon::prelude::*;

use super::cache::CacheView;
use super::kernels::Kernels;
use super::layout::{Scratch, Stored};
use super::running::{Query, Running, blocks_seen};
use super::{AttentionSpec, KvCacheLayer};
use crate::element::{Element, with_element};
use crate::error::check_dims;
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
    let _timer =
        time(Class::AttentionDecode, 4 * spec.heads * spec.head_dim * rows.iter().map(|row| row.1).sum::<usize>());
    const OP: &str = "decode_attention";
    spec.check(OP)?;
    if !spec.causal {
        return Err(Error::shape(OP, "mask", "causal", spec));
    }
    check_dims(OP, "qkv", &[rows.len(), spec.qkv_width()], qkv.dims())?;
    cache.check_spec(OP, spec)?;
    for &(slot, len) in rows {
        cache.check_slot(OP, slot)?;
        if len == 0 || len > cache.max_len() {
            return Err(Error::Index { op: OP, what: "visible length", index: len, limit: cache.max_len() + 1 });
        }
    }
    with_element!(OP, qkv.dtype(), E => {
        let mut o = vec![E::narrow(0.0); rows.len() * spec.output_width()];
        E::decode(&view_of::<E>(OP, qkv)?, &cache.read::<E>(OP)?, rows, spec, &mut o);
        tensor(o, (rows.len(), spec.output_width()))
    })
}

/// The kernel of [`decode_attention`] on register tiles.
pub(super) fn decode<E: Stored>(
    qkv: &[E],
    cache: &CacheView<'_, E>,
    rows: &[(usize, usize)],
    spec: &AttentionSpec,
    o: &mut [E],
) {
    let (group, head_dim) = (spec.group(), spec.head_dim);
    // One task per row and key-value head: its query heads lie side by side in `o`.
    o.par_chunks_mut(group * head_dim).enumerate().for_each_init(
        || (Running::new(group, spec), Scratch::default(), vec![0.0; group * head_dim]),
        |(running, scratch, heads), (task, o)| {
            let (row, kv_head) = (task / spec.kv_heads, task % spec.kv_heads);
            let (slot, len) = rows[row];
            let (start, end) = spec.visible(len - 1, len);
            let source = &qkv[row * spec.qkv_width() + kv_head * group * head_dim..];
            heads.iter_mut().zip(source).for_each(|(head, source)| *head = source.wide());
            let queries: Vec<Query> = heads.chunks_exact(head_dim).map(|q| Query { q, start, end }).collect();
            running.start();
            for n in blocks_seen(&queries) {
                let (keys, values) = cache.block(slot, kv_head, n);
                let (keys, values) = E::widen(keys, values, head_dim, scratch);
                running.attend(&queries, n, keys, values, spec.scale);
            }
            for (row, o) in o.chunks_exact_mut(head_dim).enumerate() {
                running.finish(row, o);
            }
        },
    );
}
