//! The head as one operation: hidden rows → log-probability of a label and entropy, without the logits of all rows.
//!
//! For a row `h` the logits are `l_v = (h · w_v + b_v) / temperature`, and
//!
//! ```text
//! log p_v = l_v − log Σ_u exp l_u          entropy = −Σ_v p_v log p_v
//! ```
//!
//! Logits exist one tile (at most 1024 rows × 2048 entries) at a time and are computed again in the backward pass. The
//! sums run over blocks of 512 entries anchored at entry 0, merged in order with the online softmax of Milakov and
//! Gimelshein ("Online normalizer calculation for softmax", 2018), so a row's result depends on the row alone.
//! [`logits`] with [`row_stats`] takes the same steps on a stored row and gives the same bits: what a sampler records is
//! what training computes.

mod cpu;
mod row;

use candle_core::Tensor;

pub use row::{RowStats, row_stats};

use crate::error::check_dims;
use crate::view::{tensor, view, view_mut};
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
    let shape = check(OP, h, w, bias)?;
    check_labels(OP, labels, &shape)?;
    let (h, w) = (view(OP, h)?, view(OP, w)?);
    let bias = bias.map(|bias| view(OP, bias)).transpose()?;
    let head = cpu::Head { w: &w, bias: bias.as_deref(), inv_temperature, width: shape.width };
    let rows = cpu::forward(&head, &h, labels);
    Ok(HeadOut {
        logp: tensor(rows.logp, shape.rows)?,
        entropy: tensor(rows.entropy, shape.rows)?,
        lse: tensor(rows.lse, shape.rows)?,
        inv_temperature,
    })
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
    let shape = check(OP, h, w, bias)?;
    check_labels(OP, labels, &shape)?;
    check_dims(OP, "dlogp", &[shape.rows], dlogp.dims())?;
    check_dims(OP, "lse", &[shape.rows], out.lse.dims())?;
    check_dims(OP, "dw", &[shape.vocabulary, shape.width], dw.dims())?;
    if let Some(dentropy) = dentropy {
        check_dims(OP, "dentropy", &[shape.rows], dentropy.dims())?;
    }
    if let Some(dbias) = dbias {
        check_dims(OP, "dbias", &[shape.vocabulary], dbias.dims())?;
    }
    let (h, w) = (view(OP, h)?, view(OP, w)?);
    let bias = bias.map(|bias| view(OP, bias)).transpose()?;
    let (dlogp, lse, entropy) = (view(OP, dlogp)?, view(OP, &out.lse)?, view(OP, &out.entropy)?);
    let dentropy = dentropy.map(|dentropy| view(OP, dentropy)).transpose()?;
    let head = cpu::Head { w: &w, bias: bias.as_deref(), inv_temperature: out.inv_temperature, width: shape.width };
    let rows = cpu::RowGrads { labels, lse: &lse, entropy: &entropy, dlogp: &dlogp, dentropy: dentropy.as_deref() };
    // A separate buffer: `dw` and `dbias` may share a storage, which can be locked for writing only once.
    let mut column_sums = vec![0.0; if dbias.is_some() { shape.vocabulary } else { 0 }];
    let dh = view_mut(OP, dw, |dw| cpu::backward(&head, &h, &rows, dw, &mut column_sums))?;
    if let Some(dbias) = dbias {
        view_mut(OP, dbias, |dbias| {
            for (total, term) in dbias.iter_mut().zip(&column_sums) {
                *total += term;
            }
        })?;
    }
    tensor(dh, (shape.rows, shape.width))
}

/// The logits `h · wᵀ + bias` of few rows, `[N, V]`, at temperature 1: for choosing the next token.
///
/// `h`: `[N, d]`, `w`: `[V, d]`, `bias`: `[V]`. [`row_stats`] of a row gives the bits of [`head_logprob`].
pub fn logits(h: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    const OP: &str = "logits";
    let shape = check(OP, h, w, bias)?;
    let (h, w) = (view(OP, h)?, view(OP, w)?);
    let bias = bias.map(|bias| view(OP, bias)).transpose()?;
    let head = cpu::Head { w: &w, bias: bias.as_deref(), inv_temperature: 1.0, width: shape.width };
    let mut out = vec![0.0; shape.rows * shape.vocabulary];
    head.tile(&h, 0..shape.vocabulary, &mut out);
    tensor(out, (shape.rows, shape.vocabulary))
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
    if width != w_width || vocabulary == 0 || width == 0 {
        return Err(Error::Shape {
            op,
            what: "w",
            expected: format!("[V, {width}] with neither size 0"),
            got: format!("{:?}", w.dims()),
        });
    }
    if let Some(bias) = bias {
        check_dims(op, "bias", &[vocabulary], bias.dims())?;
    }
    Ok(HeadShape { rows, width, vocabulary })
}

fn check_labels(op: &'static str, labels: &[u32], shape: &HeadShape) -> Result<()> {
    check_dims(op, "labels", &[shape.rows], &[labels.len()])?;
    match labels.iter().find(|&&label| label as usize >= shape.vocabulary) {
        Some(&label) => Err(Error::Index { op, what: "label", index: label as usize, limit: shape.vocabulary }),
        None => Ok(()),
    }
}
