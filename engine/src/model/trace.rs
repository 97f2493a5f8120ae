//! A forward that can be differentiated: what it keeps, and the backward through it.

use candle_core::{Tensor, Var};
use tandem_kernels::logprob::HeadOut;

use super::block::{BlockSaved, Keep};
use super::ends::{EmbedSaved, Ends, check_targets};
use super::pass::Dropout;
use super::unit::{Head, UnitBuffer};
use super::{LogProbs, Model};
use crate::Result;
use crate::batch::Packed;
use crate::parallel::{Gradients, pipeline};

/// Whether a block's forward runs again in the backward instead of keeping its intermediate values. Same bits either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recompute {
    /// Keep what a backward needs and would not have again for next to nothing.
    Off,
    /// Keep a block's input only: about a third more arithmetic, a fraction of the memory.
    On,
}

/// A forward over one batch, ready for its backward.
pub struct Trace<'a> {
    model: &'a Model,
    batch: &'a Packed,
    /// The rows that the head reads.
    rows: &'a [u32],
    dropout: Option<Dropout>,
    /// On the first stage of a pipeline.
    embed: Option<EmbedSaved>,
    kept: Vec<Kept>,
    /// Hidden rows after the last block, on the last stage: `[T, d]`, or `[N, d]` if only those that the head reads went so far.
    x: Option<Tensor>,
    /// What the head has added to the gradient of the ends, where the first stage of the pipeline goes on adding to it.
    head_gradient: Option<Tensor>,
}

/// What is kept of one block.
enum Kept {
    Input(Tensor),
    All(BlockSaved),
}

impl Model {
    /// Runs the forward over `batch`, of which the head is to read `rows`, and keeps what the backward needs. In a pipeline, rows
    /// come from the stage before and go to the next one.
    ///
    /// # Errors
    /// If the batch does not fit the model or a row does not exist.
    pub fn trace<'a>(
        &'a self,
        batch: &'a Packed,
        rows: &'a [u32],
        dropout: Option<Dropout>,
        recompute: Recompute,
    ) -> Result<Trace<'a>> {
        batch.check(self.spec.max_positions)?;
        check_targets(batch.tokens(), rows, None)?;
        let pass = self.pass_to(batch, rows, self.dropout_of(dropout, batch));
        let (mut x, embed) = if self.parallel.is_first_stage() {
            let ends = self.unit_of_pass(0, batch.tokens(), self.blocks.clone().map(|block| block + 1))?;
            let (x, embed) = self.ends(&ends).embed(&batch.ids, &pass)?;
            (x, Some(embed))
        } else {
            let way = pipeline::Direction::Forward;
            (pipeline::receive_rows(&self.parallel, batch.tokens(), self.spec.hidden, way)?, None)
        };
        let mut kept = Vec::with_capacity(self.blocks.len());
        for index in self.blocks.clone() {
            let unit = self.unit_of_pass(index + 1, batch.tokens(), self.after(index))?;
            let (y, saved) = self.block(index, &unit).forward(&x, &pass, Keep::Least)?;
            kept.push(match recompute {
                Recompute::On => Kept::Input(x),
                Recompute::Off => Kept::All(saved),
            });
            x = y;
        }
        let x = if self.parallel.is_last_stage() {
            Some(x)
        } else {
            pipeline::send_rows(&self.parallel, &x, pipeline::Direction::Forward)?;
            None
        };
        Ok(Trace { model: self, batch, rows, dropout, embed, kept, x, head_gradient: None })
    }

    /// A forward in which this rank has no rows: it only helps to bring sliced weights together.
    pub(crate) fn join_forward(&self) -> Result<()> {
        if self.parallel.is_first_stage() {
            self.unit(0, self.blocks.clone().map(|block| block + 1))?;
        }
        for index in self.blocks.clone() {
            self.unit(index + 1, self.after(index))?;
        }
        Ok(())
    }

    /// The backward of [`Self::join_forward`], which also takes part in adding up gradients.
    pub(crate) fn join_backward(&self, grads: &mut Gradients) -> Result<()> {
        let (first, last) = (self.parallel.is_first_stage(), self.parallel.is_last_stage());
        if last {
            self.unit(0, self.last_block())?;
            grads.open(0)?;
            if !first {
                grads.close(0)?;
            }
        }
        for index in self.blocks.clone().rev() {
            self.unit(index + 1, self.before(index))?;
            grads.open(index + 1)?;
            grads.close(index + 1)?;
        }
        if first {
            if self.embeds_with_projection() {
                self.unit(0, None)?;
            }
            grads.open(0)?;
            grads.close(0)?;
        }
        grads.end_pass()
    }

    /// The first unit that a backward goes through after the head.
    fn last_block(&self) -> Option<usize> {
        (!self.blocks.is_empty()).then_some(self.blocks.end)
    }

    /// Whether the embedding is the head of another stage, so that both add to one gradient: the head first, as on one rank.
    fn shares_embedding(&self) -> bool {
        let is_trained = self.adapters.is_none();
        is_trained && self.spec.tied && self.head == Head::Language && self.parallel.mesh.pipeline > 1
    }

    /// Whether the backward of the embedding needs weights. There is none beside adapters, for it has nothing to train.
    pub(super) fn embeds_with_projection(&self) -> bool {
        self.adapters.is_none() && self.spec.embedding_width.is_some_and(|width| width != self.spec.hidden)
    }
}

impl Trace<'_> {
    /// Adds to `grads` the gradient of `loss`, a function of the log-probabilities of `labels` at the rows of the trace.
    ///
    /// `loss` gets `[N]` tensors and returns a scalar: a *sum* over the rows, which the optimizer step divides by the global
    /// count. Returns its value and the log-probabilities; `None` on a rank that is not the last stage of its pipeline, where
    /// `loss` is not called.
    ///
    /// # Errors
    /// If a label does not exist or there are not as many as rows, or `loss` fails.
    pub fn backward_log_probs(
        self,
        labels: &[u32],
        grads: &mut Gradients,
        loss: impl FnOnce(&LogProbs) -> Result<Tensor>,
    ) -> Result<Option<(f64, LogProbs)>> {
        self.backward_head(labels, grads, |ends, h, trained| {
            let out = ends.log_probs(h, labels)?;
            let (logp, entropy) = (Var::from_tensor(&out.logp)?, Var::from_tensor(&out.entropy)?);
            let value = loss(&LogProbs { logp: logp.as_tensor().clone(), entropy: entropy.as_tensor().clone() })?;
            let mut derivatives = value.backward()?;
            let dentropy = derivatives.remove(&entropy).map(|d| d.detach().contiguous()).transpose()?;
            let dlogp = match derivatives.remove(&logp) {
                Some(d) => d.detach().contiguous()?,
                None => out.logp.zeros_like()?,
            };
            let dh = ends.log_probs_backward(h, labels, &out, &dlogp, dentropy.as_ref(), trained)?;
            Ok((scalar(&value)?, out, dh))
        })
    }

    /// Adds to `grads` the gradient of the negative log-likelihood of `labels`, `−Σ log p`: bit for bit what
    /// [`Self::backward_log_probs`] adds for this loss, with one product of the head less, since its gradient is known before the
    /// log-probabilities are.
    ///
    /// # Errors
    /// As there.
    pub fn backward_nll(self, labels: &[u32], grads: &mut Gradients) -> Result<Option<(f64, LogProbs)>> {
        self.backward_head(labels, grads, |ends, h, trained| {
            let dlogp = Tensor::full(-1f32, labels.len(), h.device())?;
            let (out, dh) = ends.log_probs_with_backward(h, labels, &dlogp, trained)?;
            Ok((scalar(&out.logp.sum_all()?.neg()?)?, out, dh))
        })
    }

    /// Adds to `grads` what `head` makes of the head's input: the loss, what the head said, and the gradient of its input.
    fn backward_head(
        mut self,
        labels: &[u32],
        grads: &mut Gradients,
        head: impl FnOnce(&Ends, &Tensor, Option<&UnitBuffer>) -> Result<(f64, HeadOut, Tensor)>,
    ) -> Result<Option<(f64, LogProbs)>> {
        check_targets(self.batch.tokens(), self.rows, Some(labels))?;
        let Some(x) = self.x.take() else {
            self.backward(None, grads)?;
            return Ok(None);
        };
        let unit = self.model.unit_of_pass(0, self.batch.tokens(), self.model.last_block())?;
        let ends = self.model.ends(&unit);
        let selected = ends.head_rows(&x, self.head_rows(&x))?;
        let buffer = grads.open(0)?;
        let trained = self.model.base_grads(&buffer);
        let (value, out, dh) = head(&ends, &selected.h, trained)?;
        let dx = ends.head_rows_backward(&selected, dh, self.batch.tokens(), trained)?;
        if self.model.shares_embedding() {
            self.head_gradient = Some(buffer.flat().copy()?);
            buffer.clear()?;
        }
        drop((selected, unit, x, buffer));
        self.backward(Some(dx), grads)?;
        Ok(Some((value, LogProbs { logp: out.logp, entropy: out.entropy })))
    }

    /// Adds to `grads` the gradient of `loss`, a function of the scores at the rows of the trace.
    ///
    /// As [`Trace::backward_log_probs`], for models with a scalar head. Returns the loss and the scores `[N]`.
    ///
    /// # Errors
    /// If `loss` fails.
    pub fn backward_scores(
        mut self,
        grads: &mut Gradients,
        loss: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<Option<(f64, Tensor)>> {
        let Some(x) = self.x.take() else {
            self.backward(None, grads)?;
            return Ok(None);
        };
        let unit = self.model.unit_of_pass(0, self.batch.tokens(), self.model.last_block())?;
        let ends = self.model.ends(&unit);
        let selected = ends.head_rows(&x, self.head_rows(&x))?;
        let scores = ends.scores(&selected.h)?;
        let leaf = Var::from_tensor(&scores)?;
        let value = loss(leaf.as_tensor())?;
        let dscores = match value.backward()?.remove(&leaf) {
            Some(d) => d.detach().contiguous()?,
            None => scores.zeros_like()?,
        };
        let value = scalar(&value)?;
        let buffer = grads.open(0)?;
        let dh = ends.scores_backward(&selected.h, &dscores, &buffer)?;
        let dx = ends.head_rows_backward(&selected, dh, self.batch.tokens(), self.model.base_grads(&buffer))?;
        drop((selected, unit, x));
        self.backward(Some(dx), grads)?;
        Ok(Some((value, scores)))
    }

    /// The rows of `x` that the head reads; `None` if no others have come so far.
    fn head_rows(&self, x: &Tensor) -> Option<&[u32]> {
        (x.dims()[0] == self.batch.tokens()).then_some(self.rows)
    }

    /// Backward through blocks and embedding from the gradient `dx` of the last hidden rows, or, on earlier stages of a pipeline,
    /// from what the next stage sends.
    fn backward(self, dx: Option<Tensor>, grads: &mut Gradients) -> Result<()> {
        let Trace { model, batch, rows, dropout, embed, mut kept, x: _, head_gradient } = self;
        let parallel = &model.parallel;
        let way = pipeline::Direction::Backward;
        if parallel.is_last_stage() && !parallel.is_first_stage() {
            grads.close(0)?;
        }
        let mut dx = match dx {
            Some(dx) => dx,
            None => pipeline::receive_rows(parallel, batch.tokens(), model.spec.hidden, way)?,
        };
        let pass = model.pass_to(batch, rows, model.dropout_of(dropout, batch));
        let mut index = model.blocks.end;
        while let Some(last) = kept.pop() {
            index -= 1;
            let unit = model.unit_of_pass(index + 1, batch.tokens(), model.before(index))?;
            let block = model.block(index, &unit);
            let saved = match last {
                Kept::All(saved) => saved,
                Kept::Input(x) => block.forward(&x, &pass, Keep::All)?.1,
            };
            let buffer = grads.open(index + 1)?;
            dx = block.backward(saved, &dx, &pass, &buffer)?;
            drop((buffer, unit));
            grads.close(index + 1)?;
        }
        match embed {
            None => {
                pipeline::send_rows(parallel, &dx, way)?;
                if let Some(gradient) = head_gradient {
                    pipeline::send_ends(parallel, &gradient)?;
                }
            }
            Some(embed) => {
                let projection = model.embeds_with_projection().then(|| model.unit_of_pass(0, batch.tokens(), None));
                let unit = projection.transpose()?;
                let buffer = grads.open(0)?;
                if model.shares_embedding() {
                    pipeline::receive_ends(parallel, buffer.flat())?;
                }
                if let Some(trained) = model.base_grads(&buffer) {
                    // Without a projection the backward of the embedding needs the layout only.
                    let weights = unit.as_deref().unwrap_or(trained);
                    let ends = Ends { spec: &model.spec, weights, adapters: None, tensor: &model.tensor };
                    ends.embed_backward(&embed, &batch.ids, dx, &pass, trained)?;
                }
                drop(buffer);
                grads.close(0)?;
            }
        }
        grads.end_pass()
    }
}

/// A scalar loss as f64.
fn scalar(value: &Tensor) -> Result<f64> {
    Ok(value.to_dtype(candle_core::DType::F64)?.to_scalar::<f64>()?)
}
