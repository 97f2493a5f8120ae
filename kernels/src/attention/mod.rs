//! Exact attention over packed sequences, forward, backward and against a key-value cache; `T × T` never exists.
//!
//! Per query row `i` and head, over the visible keys `j` of the same sequence:
//! `p_ij = softmax_j(scale · q_i · k_j)` and `o_i = Σ_j p_ij v_j`, computed block by block with a running maximum
//! (Dao et al. 2022, *FlashAttention*, algorithms 1 and 4). With grouped heads, query head `h` reads key-value head
//! `h / (H / K)` (Ainslie et al. 2023). A window `w` hides key `j` from query `i` unless `i - w < j` (Jiang et al. 2023).
//!
//! Training and decoding agree bit for bit because both follow one order of arithmetic:
//!
//! - keys go by blocks of 64 counted from key 0 of the sequence, in order; blocks with no visible key are skipped;
//! - a score is one chain of fused multiply-adds over the head's coordinates, then times `scale`;
//! - per block: maximum, `p = exp(s - m)` with hidden keys exactly 0, their sum by sixteen lanes, then the running
//!   maximum, sum and output are rescaled;
//! - an output coordinate is one chain of fused multiply-adds over the keys of the block, in order; at the end it is
//!   divided by the sum.
//!
//! How many query rows are worked on at once is not part of that order.

use candle_core::Tensor;

use self::kernels::Kernels;
use crate::element::with_element;
use crate::error::check_dims;
use crate::gemm::filled;
use crate::profile::{Class, time};
use crate::view::{tensor, view, view_of};
use crate::{Error, Result};

#[cfg(target_arch = "x86_64")]
mod amx;
mod backward;
mod blocks;
mod cache;
mod decode;
mod forward;
mod kernels;
mod layout;
mod multiply;
mod queries;
mod running;
mod tasks;
mod tile;
#[cfg(target_arch = "x86_64")]
mod vector;

pub use cache::KvCacheLayer;
pub use decode::{append_decode_attention, decode_attention};

/// Keys per block of the fixed order of arithmetic.
pub const BLOCK_KEYS: usize = 64;

/// Heads, mask and scale of an attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Query heads, H.
    pub heads: usize,
    /// Key-value heads, K; divides H.
    pub kv_heads: usize,
    /// Head width, D.
    pub head_dim: usize,
    /// Whether a query sees only keys at or before its own position.
    pub causal: bool,
    /// Sliding window: key `j` is visible to query `i` only if `i - window < j`. Needs `causal`.
    pub window: Option<usize>,
    /// Factor on the scores, usually `1 / sqrt(D)`.
    pub scale: f32,
}

impl AttentionSpec {
    /// Additions and multiplications of the two products of a forward over these sequences, without those of hidden keys.
    fn operations(&self, cu_seqlens: &[u32]) -> usize {
        let visible = |len: usize| match (self.causal, self.window) {
            (true, Some(window)) if window < len => window * (len - window) + window * (window + 1) / 2,
            (true, _) => len * (len + 1) / 2,
            (false, _) => len * len,
        };
        let pairs: usize = cu_seqlens.windows(2).map(|cut| visible(cut[1].saturating_sub(cut[0]) as usize)).sum();
        4 * self.heads * self.head_dim * pairs
    }

    /// Columns of the fused projection, `(H + 2K) D`.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Columns of the output, `H D`.
    pub fn output_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Query heads per key-value head.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// The keys that the query at `position` sees in a sequence of `len` keys, as a half-open range.
    #[inline]
    fn visible(&self, position: usize, len: usize) -> (usize, usize) {
        let end = if self.causal { position + 1 } else { len };
        let start = self.window.map_or(0, |window| (position + 1).saturating_sub(window));
        (start, end)
    }

    fn check(&self, op: &'static str) -> Result<()> {
        if self.head_dim == 0 {
            return Err(Error::shape(op, "head width", "positive", 0));
        }
        if self.kv_heads == 0 || self.heads == 0 || !self.heads.is_multiple_of(self.kv_heads) {
            let expected = format!("a positive multiple of the {} key-value heads", self.kv_heads);
            return Err(Error::shape(op, "query heads", expected, self.heads));
        }
        if !(self.scale.is_finite() && self.scale > 0.0) {
            return Err(Error::shape(op, "scale", "positive", self.scale));
        }
        if self.window == Some(0) || (self.window.is_some() && !self.causal) {
            return Err(Error::shape(op, "window", "positive, and causal", (self.window, self.causal)));
        }
        Ok(())
    }
}

/// What the forward keeps for the backward.
#[derive(Clone, Debug)]
pub struct AttentionSaved {
    /// Logarithm of the sum of the exponentials of each row's scores, `[T, H]`.
    pub lse: Tensor,
}

/// Attention of the packed sequences `cu_seqlens [B + 1]` on the fused projection `qkv [T, (H + 2K) D]`.
///
/// A row of `qkv` holds the query heads, then the key heads, then the value heads. Returns `o [T, H D]` and what
/// [`attention_backward`] needs.
///
/// # Errors
/// If a shape, dtype or device does not fit, or `cu_seqlens` does not cut `0..T` in order.
pub fn attention(qkv: &Tensor, cu_seqlens: &[u32], spec: &AttentionSpec) -> Result<(Tensor, AttentionSaved)> {
    let _timer = time(Class::Attention, spec.operations(cu_seqlens));
    const OP: &str = "attention";
    let (tokens, blocks) = check(OP, qkv, cu_seqlens, spec)?;
    with_element!(OP, qkv.dtype(), E => forward_of::<E>(OP, qkv, tokens, &blocks, spec))
}

fn forward_of<E: Kernels>(
    op: &'static str,
    qkv: &Tensor,
    tokens: usize,
    blocks: &[blocks::Block],
    spec: &AttentionSpec,
) -> Result<(Tensor, AttentionSaved)> {
    let (qkv, mut lse) = (view_of(op, qkv)?, Vec::new());
    // SAFETY: every row of the batch is in one block, and the forward writes every head of every row of the blocks.
    let o = unsafe {
        filled(tokens * spec.output_width(), |o| {
            lse = filled(tokens * spec.heads, |lse| E::forward(&qkv, blocks, spec, o, lse));
        })
    };
    let o = tensor(o, (tokens, spec.output_width()))?;
    Ok((o, AttentionSaved { lse: tensor(lse, (tokens, spec.heads))? }))
}

/// Backward of [`attention`]: from `d_o [T, H D]` to the gradient of `qkv`, `[T, (H + 2K) D]`.
///
/// `qkv`, `cu_seqlens` and `spec` are those of the forward, `o` and `saved` what it returned. With `P` the
/// probabilities: `dV = Pᵀ dO`, `dS = scale · P ∘ (dO Vᵀ - rowsum(dO ∘ O))`, `dQ = dS K`, `dK = dSᵀ Q` (Dao et al. 2022,
/// appendix B.2). Gradients of a key-value head are summed over its query heads in order.
///
/// # Errors
/// If a shape, dtype or device does not fit, or `cu_seqlens` does not cut `0..T` in order.
pub fn attention_backward(
    d_o: &Tensor,
    qkv: &Tensor,
    o: &Tensor,
    saved: &AttentionSaved,
    cu_seqlens: &[u32],
    spec: &AttentionSpec,
) -> Result<Tensor> {
    let _timer = time(Class::AttentionBackward, 5 * spec.operations(cu_seqlens) / 2);
    const OP: &str = "attention_backward";
    let (tokens, blocks) = check(OP, qkv, cu_seqlens, spec)?;
    check_dims(OP, "d_o", &[tokens, spec.output_width()], d_o.dims())?;
    check_dims(OP, "o", &[tokens, spec.output_width()], o.dims())?;
    check_dims(OP, "saved lse", &[tokens, spec.heads], saved.lse.dims())?;
    let lse = view(OP, &saved.lse)?;
    with_element!(OP, qkv.dtype(), E => {
        let (d_o, qkv, o) = (view_of::<E>(OP, d_o)?, view_of::<E>(OP, qkv)?, view_of::<E>(OP, o)?);
        let inputs = backward::Inputs { d_o: &d_o, qkv: &qkv, o: &o, lse: &lse };
        // SAFETY: every row of the batch is in one block, and the backward writes every head of every row of the blocks.
        let dqkv = unsafe { filled(tokens * spec.qkv_width(), |dqkv| E::backward(inputs, &blocks, spec, dqkv)) };
        tensor(dqkv, (tokens, spec.qkv_width()))
    })
}

/// Tokens of `qkv` and the blocks of its sequences, after checking the arguments.
fn check(
    op: &'static str,
    qkv: &Tensor,
    cu_seqlens: &[u32],
    spec: &AttentionSpec,
) -> Result<(usize, Vec<blocks::Block>)> {
    spec.check(op)?;
    let &[tokens, width] = qkv.dims() else {
        return Err(Error::shape(op, "qkv", "[T, (H + 2K) D]", qkv.dims()));
    };
    check_dims(op, "qkv", &[tokens, spec.qkv_width()], &[tokens, width])?;
    let cuts = cu_seqlens.first() == Some(&0) && cu_seqlens.last() == Some(&(tokens as u32)) && cu_seqlens.is_sorted();
    if !cuts {
        let expected = format!("0 to {tokens} in ascending order");
        return Err(Error::shape(op, "cu_seqlens", expected, cu_seqlens));
    }
    Ok((tokens, blocks::cut(cu_seqlens)))
}
