//! The head as one operation: hidden rows → log-probability of a label and entropy, without the logits of all rows.
//!
//! For a row `h` the logits are `l_v = (h · w_v + b_v) / temperature`, and
//!
//! ```text
//! log p_v = l_v − log Σ_u exp l_u          entropy = −Σ_v p_v log p_v
//! ```
//!
//! Logits exist one tile (at most 1024 rows × 2048 entries) at a time and are computed again in the backward pass, unless
//! forward and backward are one call ([`head_logprob_with_backward`]). The sums run over blocks of 512 entries anchored at
//! entry 0, merged in order with the online softmax of Milakov and Gimelshein ("Online normalizer calculation for softmax",
//! 2018), so a row's result depends on the row alone. [`logits`] with [`row_stats`] takes the same steps on a stored row and
//! gives the same bits: what a sampler records is what training computes.
//!
//! Hidden rows and weights are f32, or bf16; everything else is f32. In bf16 the gradient of a tile of logits is rounded
//! to bf16 before its two products.
//!
//! A vocabulary may be cut into shards at multiples of [`BLOCK`] entries, on one rank or many: [`head_partials`] of each
//! shard, [`HeadPartial::merge`] in order of entries and [`head_finish`] make a row's result, which depends on the cuts
//! but not on who holds what. One shard takes the steps of [`head_logprob`], and gives its bits.

mod at_once;
mod cpu;
mod full;
mod half;
mod products;
mod row;
mod shard;

use candle_core::Tensor;

pub use at_once::head_logprob_with_backward;
pub use row::{BLOCK, HeadPartial, RowStats, row_partial, row_stats};
pub use shard::{head_finish, head_partials, head_shard_backward, head_shard_input_grad};

use crate::error::check_dims;
use crate::gemm::{PackedMatrix, full_linear, packed};
use crate::{Error, Result};

/// What [`head_logprob`] computes for `N` rows; its backward needs it again.
#[derive(Clone, Debug)]
pub struct HeadOut {
    /// Natural log-probability of each row's label, `[N]`.
    pub logp: Tensor,
    /// Entropy of each row's distribution in nats, `[N]`.
    pub entropy: Tensor,
    /// log Σ exp of each row's logits, `[N]`.
    pub lse: Tensor,
    /// The factor on the logits that the forward pass was called with.
    pub inv_temperature: f32,
}

/// Log-probability of `labels` and entropy under the head `w` for rows `h`.
///
/// `h`: `[N, d]`, `w`: `[V, d]`, `bias`: `[V]`, `labels`: `N` entries below `V`. `inv_temperature` multiplies the logits.
pub fn head_logprob(
    h: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
    labels: &[u32],
    inv_temperature: f32,
) -> Result<HeadOut> {
    const OP: &str = "head_logprob";
    check_labels(OP, labels, &check_whole(OP, h, w, bias)?)?;
    shard::finish(OP, &shard::partials(OP, h, w, bias, 0, labels, inv_temperature)?, inv_temperature)
}

/// The backward of [`head_logprob`]: returns the gradient of `h`, `[N, d]`, and adds those of `w` and `bias` in place.
///
/// With `g` the gradient of `logp` and `e` that of `entropy` (zero if `None`), both `[N]`:
///
/// ```text
/// dl_v = (g (1[v = label] − p_v) − e p_v (log p_v + entropy)) / temperature      dh = dl · W      dW += dlᵀ · h
/// ```
///
/// `out` is what the forward call on the same `h`, `w`, `bias` and `labels` returned. `dw`: `[V, d]`, `dbias`: `[V]`; both
/// may be views of one storage, which must hold none of the inputs.
pub fn head_logprob_backward(
    dlogp: &Tensor,
    dentropy: Option<&Tensor>,
    h: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
    labels: &[u32],
    out: &HeadOut,
    dw: &Tensor,
    dbias: Option<&Tensor>,
) -> Result<Tensor> {
    const OP: &str = "head_logprob_backward";
    check_labels(OP, labels, &check_whole(OP, h, w, bias)?)?;
    shard::backward(OP, dlogp, dentropy, h, w, bias, 0, labels, out, Some(dw), dbias)
}

/// The logits `h · wᵀ + bias` of few rows, `[N, V]`, at temperature 1: for choosing the next token.
///
/// `h`: `[N, d]`, `w`: `[V, d]`, `bias`: `[V]`; of a shard, its own entries only. [`row_stats`] of a row gives the bits of
/// [`head_logprob`], [`row_partial`] of a shard's row those of [`head_partials`].
pub fn logits(h: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    const OP: &str = "logits";
    check(OP, h, w, bias)?;
    full_linear(OP, h, w, bias)
}

/// Bit for bit [`logits`] with the weight that was packed: for every step of decoding.
///
/// `h`: `[N, d]`, `bias`: `[V]`.
pub fn logits_packed(h: &Tensor, w: &PackedMatrix, bias: Option<&Tensor>) -> Result<Tensor> {
    packed::<f32>("logits_packed", h, w, bias)
}

/// Sizes of one call.
struct HeadShape {
    rows: usize,
    width: usize,
    vocabulary: usize,
}

fn check(op: &'static str, h: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<HeadShape> {
    let (&[rows, width], &[vocabulary, w_width]) = (h.dims(), w.dims()) else {
        return Err(Error::shape(op, "h and w", "[N, d] and [V, d]", (h.dims(), w.dims())));
    };
    if width != w_width || width == 0 {
        return Err(width_error(op, width, w));
    }
    if let Some(bias) = bias {
        check_dims(op, "bias", &[vocabulary], bias.dims())?;
    }
    Ok(HeadShape { rows, width, vocabulary })
}

/// [`check`], refusing a vocabulary without entries: only a shard may have none.
fn check_whole(op: &'static str, h: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<HeadShape> {
    let shape = check(op, h, w, bias)?;
    if shape.vocabulary == 0 { Err(width_error(op, shape.width, w)) } else { Ok(shape) }
}

fn width_error(op: &'static str, width: usize, w: &Tensor) -> Error {
    let expected = format!("[V, {width}] with neither size 0");
    Error::Shape { op, what: "w", expected, got: format!("{:?}", w.dims()) }
}

fn check_labels(op: &'static str, labels: &[u32], shape: &HeadShape) -> Result<()> {
    check_dims(op, "labels", &[shape.rows], &[labels.len()])?;
    match labels.iter().find(|&&label| label as usize >= shape.vocabulary) {
        Some(&label) => Err(Error::Index { op, what: "label", index: label as usize, limit: shape.vocabulary }),
        None => Ok(()),
    }
}
