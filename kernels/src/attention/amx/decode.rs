//! Decoding on tiles: the query heads that share keys are rows of one tile.

use half::bf16;
use rayon::prelude::*;

use super::super::cache::CacheView;
use super::super::forward::block_range;
use super::super::layout::padded_pairs;
use super::forward::Running;
use super::product::Left;
use super::vector::{pack_rows, range_mask};
use super::{AttentionSpec, BLOCK_KEYS, Head, Room, block_len};
use crate::amx::Tiles;

/// Query heads that are worked on at once.
const ROWS: usize = 16;

/// What a task works with.
struct Task {
    /// `[16, D padded]`.
    q: Room<bf16>,
    /// Values of a block of which not all keys are written, `[32, D padded, 2]`.
    values: Room<bf16>,
    running: Running<ROWS>,
}

/// Attention of `qkv [R, (H + 2K) D]` against the cache; row `r` sees the first `len` keys of its slot,
/// `rows[r] = (slot, len)`. Writes `o [R, H D]`.
pub(in super::super) fn decode(
    qkv: &[bf16],
    cache: &CacheView<'_, bf16>,
    rows: &[(usize, usize)],
    spec: &AttentionSpec,
    o: &mut [bf16],
) {
    let (group, head_dim) = (spec.group(), spec.head_dim);
    o.par_chunks_mut(group * head_dim).enumerate().for_each_init(
        || Task {
            q: Room::new(ROWS * padded_pairs(spec.head_dim)),
            values: Room::new(block_len(spec)),
            running: Running::new(spec),
        },
        |task, (n, o)| {
            let (row, kv_head) = (n / spec.kv_heads, n % spec.kv_heads);
            let heads = &qkv[row * spec.qkv_width() + kv_head * group * head_dim..][..group * head_dim];
            for (heads, o) in heads.chunks(ROWS * head_dim).zip(o.chunks_mut(ROWS * head_dim)) {
                // SAFETY: this path is taken only where the processor has tiles and their AVX-512.
                unsafe { attend(heads, |n| cache.block(rows[row].0, kv_head, n), rows[row].1, spec, task, o) };
            }
        },
    );
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn attend<'a>(
    heads: &[bf16],
    block: impl Fn(usize) -> (&'a [bf16], &'a [bf16]),
    len: usize,
    spec: &AttentionSpec,
    task: &mut Task,
    o: &mut [bf16],
) {
    let Some(tiles) = Tiles::new() else { unreachable!("the path of tiles without tiles") };
    let (head_dim, stride) = (spec.head_dim, padded_pairs(spec.head_dim));
    pack_rows(Head { source: heads, width: head_dim, column: 0, head_dim }, &mut task.q);
    let (start, end) = spec.visible(len - 1, len);
    task.running.start();
    for n in start / BLOCK_KEYS..end.div_ceil(BLOCK_KEYS) {
        let (keys, values) = block(n);
        let (from, to) = block_range(start, end, n * BLOCK_KEYS);
        let mut masks = [0; ROWS];
        masks[..heads.len() / head_dim].fill(range_mask(from, to));
        let values = if to < BLOCK_KEYS {
            written(values, to, stride, &mut task.values);
            &task.values
        } else {
            values
        };
        task.running.attend(&tiles, Left { values: &task.q, stride }, keys, values, &masks, spec.scale);
    }
    for (row, o) in o.chunks_exact_mut(head_dim).enumerate() {
        task.running.finish(row, o);
    }
}

/// Copies the values of the first `keys` of a block and zeros for the others, as the forward packs them: zero times what
/// the slot held before need not be zero.
fn written(values: &[bf16], keys: usize, stride: usize, out: &mut [bf16]) {
    let whole = keys / 2 * 2 * stride;
    out[..whole].copy_from_slice(&values[..whole]);
    out[whole..].fill(bf16::ZERO);
    if !keys.is_multiple_of(2) {
        for (out, pair) in out[whole..].chunks_exact_mut(2).zip(values[whole..][..2 * stride].chunks_exact(2)) {
            out[0] = pair[0];
        }
    }
}
