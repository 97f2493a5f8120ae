//! The head and its backward in one, for losses whose gradient does not depend on their value.

use candle_core::Tensor;

use super::cpu::Head;
use super::products::HeadElement;
use super::{HeadOut, check_labels, check_whole, head_logprob, head_logprob_backward, shard};
use crate::Result;
use crate::element::with_element;
use crate::error::check_dims;
use crate::view::{tensor, view, view_mut, view_of};

/// [`head_logprob`] and [`head_logprob_backward`] at once, for a loss whose gradient `dlogp` is known before its value, as that
/// of a negative log-likelihood is. Returns what the one returns and the gradient of `h`, bit for bit.
///
/// In f32 logits are made once where those of enough rows fit 64 MiB, as `FusedLinearCrossEntropy` of Hsu et al., "Liger Kernel:
/// Efficient Triton Kernels for LLM Training" (2024), does: a third of the products of the backward is saved. (In bf16,
/// where a product takes a fifth of the time and bytes take the same, they are made again.) `dlogp`: `[N]`; the others as there.
pub fn head_logprob_with_backward(
    dlogp: &Tensor,
    h: &Tensor,
    w: &Tensor,
    labels: &[u32],
    inv_temperature: f32,
    dw: &Tensor,
) -> Result<(HeadOut, Tensor)> {
    const OP: &str = "head_logprob_with_backward";
    let shape = check_whole(OP, h, w, None)?;
    check_labels(OP, labels, &shape)?;
    check_dims(OP, "dlogp", &[shape.rows], dlogp.dims())?;
    check_dims(OP, "dw", &[shape.vocabulary, shape.width], dw.dims())?;
    let both = with_element!(OP, w.dtype(), E => {
        let (dlogp, h, w) = (view(OP, dlogp)?, view_of::<E>(OP, h)?, view_of::<E>(OP, w)?);
        let head = Head { w: &w, bias: None, first_entry: 0, inv_temperature, width: shape.width };
        view_mut(OP, dw, |dw| E::fused_both(&head, &h, labels, &dlogp, dw))
    })?;
    if let Some((partials, dh)) = both {
        return Ok((shard::finish(OP, &partials, inv_temperature)?, tensor(dh, (shape.rows, shape.width))?));
    }
    let out = head_logprob(h, w, None, labels, inv_temperature)?;
    let dh = head_logprob_backward(dlogp, None, h, w, None, labels, &out, dw, None)?;
    Ok((out, dh))
}
