//! The head over one shard of the vocabulary: what each rank computes, and how the parts join.

use candle_core::Tensor;

use super::cpu::{Head, RowGrads, backward as backward_rows, forward};
use super::row::{BLOCK, HeadPartial};
use super::{HeadOut, check};
use crate::element::with_element;
use crate::error::check_dims;
use crate::gemm::bias_values;
use crate::profile::{Class, time};
use crate::view::{tensor, view, view_mut, view_of};
use crate::{Error, Result};

/// One shard's part of [`super::head_logprob`]: a [`HeadPartial`] for each of the `N` rows of `h`.
///
/// `h`: `[N, d]`, `w_shard`: `[V_shard, d]`, `bias`: `[V_shard]`, those of the entries from `first_entry` on, which is a
/// multiple of [`BLOCK`]; a shard may have no entries. `labels`: `N` entries of the whole vocabulary, whether in this shard
/// or not. `inv_temperature` multiplies the logits.
///
/// # Errors
/// [`Error::Value`] if `first_entry` is not a multiple of [`BLOCK`]; else if a shape, dtype or device does not fit.
pub fn head_partials(
    h: &Tensor,
    w_shard: &Tensor,
    bias: Option<&Tensor>,
    first_entry: usize,
    labels: &[u32],
    inv_temperature: f32,
) -> Result<Vec<HeadPartial>> {
    partials("head_partials", h, w_shard, bias, first_entry, labels, inv_temperature)
}

/// What [`super::head_logprob`] returns, from the partials of `N` rows of which every shard has been merged, in order.
///
/// `inv_temperature` is the one that [`head_partials`] was called with.
///
/// # Errors
/// [`Error::Shape`] if the label of a row was in none of the shards.
pub fn head_finish(partials: &[HeadPartial], inv_temperature: f32) -> Result<HeadOut> {
    finish("head_finish", partials, inv_temperature)
}

/// One shard's part of [`super::head_logprob_backward`]: returns its part of the gradient of `h`, `[N, d]`, which the sum
/// over all shards completes, and adds the gradients of `w_shard` and `bias` in place.
///
/// `dlogp`, `dentropy` and `out` are those of the whole rows, `out` from [`head_finish`]; `w_shard`, `bias`, `first_entry`
/// and `labels` are those of [`head_partials`]. `dw_shard`: `[V_shard, d]`, `dbias`: `[V_shard]`; both may be views of one
/// storage, which must hold none of the inputs.
///
/// # Errors
/// As [`head_partials`].
pub fn head_shard_backward(
    dlogp: &Tensor,
    dentropy: Option<&Tensor>,
    h: &Tensor,
    w_shard: &Tensor,
    bias: Option<&Tensor>,
    first_entry: usize,
    labels: &[u32],
    out: &HeadOut,
    dw_shard: &Tensor,
    dbias: Option<&Tensor>,
) -> Result<Tensor> {
    const OP: &str = "head_shard_backward";
    backward(OP, dlogp, dentropy, h, w_shard, bias, first_entry, labels, out, Some(dw_shard), dbias)
}

/// What [`head_shard_backward`] returns, without the gradient of a head that is not trained.
///
/// # Errors
/// As [`head_partials`].
pub fn head_shard_input_grad(
    dlogp: &Tensor,
    dentropy: Option<&Tensor>,
    h: &Tensor,
    w_shard: &Tensor,
    bias: Option<&Tensor>,
    first_entry: usize,
    labels: &[u32],
    out: &HeadOut,
) -> Result<Tensor> {
    const OP: &str = "head_shard_input_grad";
    backward(OP, dlogp, dentropy, h, w_shard, bias, first_entry, labels, out, None, None)
}

/// Blocks of the row sums lie at multiples of [`BLOCK`]; a shard without entries may lie at the end of the vocabulary.
fn check_first_entry(op: &'static str, first_entry: usize, entries: usize) -> Result<()> {
    if entries == 0 || first_entry.is_multiple_of(BLOCK) {
        return Ok(());
    }
    Err(Error::Value { op, what: "first_entry", expected: "a multiple of 512", got: first_entry as f64 })
}

/// [`head_partials`] under the name of the operation that a caller asked for.
pub(super) fn partials(
    op: &'static str,
    h: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
    first_entry: usize,
    labels: &[u32],
    inv_temperature: f32,
) -> Result<Vec<HeadPartial>> {
    let shape = check(op, h, w, bias)?;
    let _timer = time(Class::Head, 2 * shape.rows * shape.vocabulary * shape.width);
    check_first_entry(op, first_entry, shape.vocabulary)?;
    check_dims(op, "labels", &[shape.rows], &[labels.len()])?;
    let bias = bias.map(|bias| bias_values(op, bias, w)).transpose()?;
    with_element!(op, w.dtype(), E => {
        let (h, w) = (view_of::<E>(op, h)?, view_of::<E>(op, w)?);
        let head = Head { w: &w, bias: bias.as_deref(), first_entry, inv_temperature, width: shape.width };
        Ok(forward(&head, &h, labels))
    })
}

/// [`head_finish`] under the name of the operation that a caller asked for.
pub(super) fn finish(op: &'static str, partials: &[HeadPartial], inv_temperature: f32) -> Result<HeadOut> {
    let rows = partials.len();
    let [mut logp, mut entropy, mut lse] = [(); 3].map(|()| Vec::with_capacity(rows));
    for (row, partial) in partials.iter().enumerate() {
        // A logit that is NaN makes the sum NaN too and goes through, to be seen in the result.
        if partial.label_logit.is_nan() && !partial.sum.is_nan() {
            return Err(Error::Shape {
                op,
                what: "every label",
                expected: "an entry of one of the shards".to_string(),
                got: format!("none for row {row}"),
            });
        }
        let stats = partial.finish();
        logp.push(stats.log_prob(partial.label_logit));
        entropy.push(stats.entropy);
        lse.push(stats.lse);
    }
    let [logp, entropy, lse] = [tensor(logp, rows)?, tensor(entropy, rows)?, tensor(lse, rows)?];
    Ok(HeadOut { logp, entropy, lse, inv_temperature })
}

/// [`head_shard_backward`] under the name of the operation that a caller asked for.
pub(super) fn backward(
    op: &'static str,
    dlogp: &Tensor,
    dentropy: Option<&Tensor>,
    h: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
    first_entry: usize,
    labels: &[u32],
    out: &HeadOut,
    dw: Option<&Tensor>,
    dbias: Option<&Tensor>,
) -> Result<Tensor> {
    let shape = check(op, h, w, bias)?;
    // The logits again, then one product or two of their gradients.
    let products = if dw.is_some() { 3 } else { 2 };
    let _timer = time(Class::HeadBackward, 2 * products * shape.rows * shape.vocabulary * shape.width);
    check_first_entry(op, first_entry, shape.vocabulary)?;
    check_dims(op, "labels", &[shape.rows], &[labels.len()])?;
    check_dims(op, "dlogp", &[shape.rows], dlogp.dims())?;
    check_dims(op, "lse", &[shape.rows], out.lse.dims())?;
    if let Some(dw) = dw {
        check_dims(op, "dw", &[shape.vocabulary, shape.width], dw.dims())?;
    }
    if let Some(dentropy) = dentropy {
        check_dims(op, "dentropy", &[shape.rows], dentropy.dims())?;
    }
    if let Some(dbias) = dbias {
        check_dims(op, "dbias", &[shape.vocabulary], dbias.dims())?;
    }
    let (dlogp, lse, entropy) = (view(op, dlogp)?, view(op, &out.lse)?, view(op, &out.entropy)?);
    let dentropy = dentropy.map(|dentropy| view(op, dentropy)).transpose()?;
    let inv_temperature = out.inv_temperature;
    let bias = bias.map(|bias| bias_values(op, bias, w)).transpose()?;
    let rows = RowGrads { labels, lse: &lse, entropy: &entropy, dlogp: &dlogp, dentropy: dentropy.as_deref() };
    // A separate buffer: `dw` and `dbias` may share a storage, which can be locked for writing only once.
    let mut column_sums = vec![0.0; if dbias.is_some() { shape.vocabulary } else { 0 }];
    let dh = with_element!(op, w.dtype(), E => {
        let (h, w) = (view_of::<E>(op, h)?, view_of::<E>(op, w)?);
        let head = Head { w: &w, bias: bias.as_deref(), first_entry, inv_temperature, width: shape.width };
        match dw {
            Some(dw) => view_mut(op, dw, |dw| backward_rows(&head, &h, &rows, Some(dw), &mut column_sums)),
            None => Ok(backward_rows(&head, &h, &rows, None, &mut column_sums)),
        }
    })?;
    if let Some(dbias) = dbias {
        view_mut(op, dbias, |dbias| {
            for (total, term) in dbias.iter_mut().zip(&column_sums) {
                *total += term;
            }
        })?;
    }
    tensor(dh, (shape.rows, shape.width))
}
