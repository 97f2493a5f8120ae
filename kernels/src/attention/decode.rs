//! Attention of single rows against the cache: the forward's arithmetic, reading blocks that are already packed.

use candle_core::Tensor;
use rayon::prelude::*;

use super::forward::{Query, Running};
use super::{AttentionSpec, KvCacheLayer};
use crate::error::check_dims;
use crate::view::{tensor, view};
use crate::{Error, Result};

/// Attention of the query heads of `qkv [R, (H + 2K) D]` (rotated) against the cache; returns `o [R, H D]`.
///
/// Row `r` stands at position `len - 1` of its slot, `rows[r] = (slot, len)`, and sees the first `len` keys (fewer with
/// a window), its own included: [`KvCacheLayer::append`] comes first. A slot may appear in several rows, as when a prompt
/// is read in pieces. The result is that of [`super::attention`] on the whole sequence, bit for bit.
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
    let (qkv, cache) = (view(OP, qkv)?, cache.read(OP)?);
    let (group, head_dim) = (spec.group(), spec.head_dim);
    let mut o = vec![0.0; rows.len() * spec.output_width()];
    // One task per row and key-value head: its query heads lie side by side in `o`.
    o.par_chunks_mut(group * head_dim).enumerate().for_each_init(
        || Running::new(group, spec),
        |running, (task, o)| {
            let (row, kv_head) = (task / spec.kv_heads, task % spec.kv_heads);
            let (slot, len) = rows[row];
            let (start, end) = spec.visible(len - 1, len);
            let heads = &qkv[row * spec.qkv_width() + kv_head * group * head_dim..][..group * head_dim];
            let queries: Vec<Query> = heads.chunks_exact(head_dim).map(|q| Query { q, start, end }).collect();
            running.attend(&queries, spec.scale, |n| cache.block(slot, kv_head, n));
            for (row, o) in o.chunks_exact_mut(head_dim).enumerate() {
                running.finish(row, o);
            }
        },
    );
    tensor(o, (rows.len(), spec.output_width()))
}
