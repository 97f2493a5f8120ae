//! A forward that can be differentiated: what it keeps, and the backward through it.

use candle_core::{Tensor, Var};

use super::block::BlockSaved;
use super::ends::{EmbedSaved, check_targets};
use super::pass::{Dropout, PassDropout};
use super::unit::UnitBuffer;
use super::{LogProbs, Model};
use crate::Result;
use crate::batch::Packed;

/// Whether a block's forward runs again in the backward instead of keeping its intermediate values. Same bits either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recompute {
    /// Keep every intermediate value.
    Off,
    /// Keep a block's input only: about a third more arithmetic, a fraction of the memory.
    On,
}

/// A forward over one batch, ready for its backward.
pub struct Trace<'a> {
    model: &'a Model,
    batch: &'a Packed,
    dropout: Option<Dropout>,
    embed: EmbedSaved,
    kept: Vec<Kept>,
    /// Hidden rows after the last block, `[T, d]`.
    x: Tensor,
}

/// What is kept of one block.
enum Kept {
    Input(Tensor),
    All(BlockSaved),
}

impl Model {
    /// Runs the forward over `batch` and keeps what the backward needs.
    ///
    /// # Errors
    /// If the batch does not fit the model.
    pub fn trace<'a>(&'a self, batch: &'a Packed, dropout: Option<Dropout>, recompute: Recompute) -> Result<Trace<'a>> {
        batch.check(self.spec.max_positions)?;
        let pass = self.pass(&batch.cu_seqlens, &batch.positions, PassDropout::of(dropout, batch));
        let (mut x, embed) = self.ends().embed(&batch.ids, &pass)?;
        let mut kept = Vec::with_capacity(self.spec.layers);
        for index in 0..self.spec.layers {
            let (y, saved) = self.block(index).forward(&x, &pass)?;
            kept.push(match recompute {
                Recompute::On => Kept::Input(x),
                Recompute::Off => Kept::All(saved),
            });
            x = y;
        }
        Ok(Trace { model: self, batch, dropout, embed, kept, x })
    }
}

impl Trace<'_> {
    /// Adds to `grads` the gradient of `loss`, a function of the log-probabilities of `labels` at `rows` of the batch.
    ///
    /// `loss` gets `[N]` tensors and returns a scalar: a *sum* over the rows, which the optimizer step divides by the global
    /// count. Returns its value and the log-probabilities.
    ///
    /// # Errors
    /// If a row or label does not exist, or `loss` fails.
    pub fn backward_log_probs(
        self,
        rows: &[u32],
        labels: &[u32],
        grads: &[UnitBuffer],
        loss: impl FnOnce(&LogProbs) -> Result<Tensor>,
    ) -> Result<(f64, LogProbs)> {
        check_targets(self.batch.tokens(), rows, Some(labels))?;
        let ends = self.model.ends();
        let selected = ends.head_rows(&self.x, rows)?;
        let out = ends.log_probs(&selected.h, labels)?;
        let (logp, entropy) = (Var::from_tensor(&out.logp)?, Var::from_tensor(&out.entropy)?);
        let value = loss(&LogProbs { logp: logp.as_tensor().clone(), entropy: entropy.as_tensor().clone() })?;
        let mut derivatives = value.backward()?;
        let dentropy = derivatives.remove(&entropy).map(|d| d.detach().contiguous()).transpose()?;
        let dlogp = match derivatives.remove(&logp) {
            Some(d) => d.detach().contiguous()?,
            None => out.logp.zeros_like()?,
        };
        let value = scalar(&value)?;
        let dh = ends.log_probs_backward(&selected.h, labels, &out, &dlogp, dentropy.as_ref(), &grads[0])?;
        let dx = ends.head_rows_backward(&selected, dh, self.batch.tokens(), &grads[0])?;
        drop(selected);
        self.backward(dx, grads)?;
        Ok((value, LogProbs { logp: out.logp, entropy: out.entropy }))
    }

    /// Adds to `grads` the gradient of `loss`, a function of the scores at `rows` of the batch.
    ///
    /// As [`Trace::backward_log_probs`], for models with a scalar head. Returns the loss and the scores `[N]`.
    ///
    /// # Errors
    /// If a row does not exist or `loss` fails.
    pub fn backward_scores(
        self,
        rows: &[u32],
        grads: &[UnitBuffer],
        loss: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<(f64, Tensor)> {
        check_targets(self.batch.tokens(), rows, None)?;
        let ends = self.model.ends();
        let selected = ends.head_rows(&self.x, rows)?;
        let scores = ends.scores(&selected.h)?;
        let leaf = Var::from_tensor(&scores)?;
        let value = loss(leaf.as_tensor())?;
        let dscores = match value.backward()?.remove(&leaf) {
            Some(d) => d.detach().contiguous()?,
            None => scores.zeros_like()?,
        };
        let value = scalar(&value)?;
        let dh = ends.scores_backward(&selected.h, &dscores, &grads[0])?;
        let dx = ends.head_rows_backward(&selected, dh, self.batch.tokens(), &grads[0])?;
        drop(selected);
        self.backward(dx, grads)?;
        Ok((value, scores))
    }

    /// Backward through blocks and embedding from the gradient `dx [T, d]` of the last hidden rows.
    fn backward(self, mut dx: Tensor, grads: &[UnitBuffer]) -> Result<()> {
        let Trace { model, batch, dropout, embed, mut kept, x: _ } = self;
        let pass = model.pass(&batch.cu_seqlens, &batch.positions, PassDropout::of(dropout, batch));
        while let Some(last) = kept.pop() {
            let index = kept.len();
            let block = model.block(index);
            let saved = match last {
                Kept::All(saved) => saved,
                Kept::Input(x) => block.forward(&x, &pass)?.1,
            };
            dx = block.backward(saved, &dx, &pass, &grads[index + 1])?;
        }
        model.ends().embed_backward(&embed, &batch.ids, dx, &pass, &grads[0])
    }
}

/// A scalar loss as f64.
fn scalar(value: &Tensor) -> Result<f64> {
    Ok(value.to_dtype(candle_core::DType::F64)?.to_scalar::<f64>()?)
}
