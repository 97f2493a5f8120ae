//! One model in two modes, told apart by type: [`Engine<Train>`] ⇄ [`Engine<Generate>`].

use std::time::{Duration, Instant};

use candle_core::Tensor;

use crate::batch::{MicroBatch, Packed};
use crate::generate::{CacheSize, Completion, KvCache, OnToken, Request, SamplingKey, Scheduler};
use crate::model::{Dropout, LogProbs, Model, Recompute, Trace};
use crate::parallel::{Gradients, Placement};
use crate::precision::WeightFormat;
use crate::train::{Optimizer, OptimizerConfig, StepOutcome, schedule};
use crate::{Error, Result};

/// Mode in which weights are updated. Holds the gradients.
#[derive(Debug)]
pub struct Train {
    grads: Gradients,
    /// The copy that the last generation used, if its memory is kept.
    copy: Option<Model>,
    cache: Option<KvCache>,
    /// Bytes that the step under way has sent so far.
    sent_bytes: u64,
}

/// Mode in which tokens are sampled. Holds the key-value cache.
#[derive(Debug)]
pub struct Generate {
    /// The weights laid out for generation: those of training themselves where that is possible.
    model: Model,
    cache: KvCache,
}

/// How an engine switches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SwitchConfig {
    /// Whether training has the memory of the key-value cache to itself.
    pub release_inference_cache: bool,
    /// Whether the memory of the inference copy is kept while training.
    pub pin_parameters: bool,
    /// Units that are brought to their new layout at once.
    pub gather_units: usize,
    /// What the linear maps of the copy that generates are kept in. In 8 bits there is always a copy, made anew at each switch,
    /// and what is recorded while sampling are its log-probabilities, not those of the model that is trained.
    pub weights: WeightFormat,
}

impl Default for SwitchConfig {
    fn default() -> Self {
        Self { release_inference_cache: true, pin_parameters: false, gather_units: 8, weights: WeightFormat::Precision }
    }
}

/// A model with its optimizer, in one mode.
///
/// Where the layout of training can generate, switching copies nothing: generation reads the training weights themselves.
/// Elsewhere the switch brings every unit, a few at a time, to the tensor-parallel layout of generation; the weights of
/// training stay where they are, and switching back drops the copy. A model with adapters always generates with such a copy,
/// into which the adapters are merged; they and the base stay as they are. So does one that generates in 8 bits.
#[derive(Debug)]
pub struct Engine<Mode> {
    model: Model,
    optimizer: Optimizer,
    placement: Placement,
    switching: SwitchConfig,
    mode: Mode,
}

/// What a mode switch cost this rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SwitchReport {
    /// Bytes of weights that came from other ranks.
    pub moved_bytes: u64,
    /// Bytes that the new mode allocated: copy and cache, or the gradients.
    pub allocated_bytes: u64,
    /// Time taken.
    pub elapsed: Duration,
}

impl<Mode> Engine<Mode> {
    /// The model as it is trained.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The optimizer.
    pub fn optimizer(&self) -> &Optimizer {
        &self.optimizer
    }

    /// Where its numbers are kept.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// Log-probabilities of the model as it is trained, the same in both modes; see [`Model::log_probs`]. Those of a model with
    /// adapters differ by rounding from those recorded while sampling, for which the adapters are merged, and those recorded
    /// by a copy in 8 bits by what these leave out.
    ///
    /// # Errors
    /// As [`Model::log_probs`].
    pub fn log_probs(&self, batch: &Packed, rows: &[u32], labels: &[u32]) -> Result<LogProbs> {
        self.model.log_probs(batch, rows, labels)
    }
}

impl Engine<Train> {
    /// A model on one rank with a fresh optimizer.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn new(model: Model, config: OptimizerConfig) -> Result<Self> {
        Self::placed(model, config, Placement::solo())
    }

    /// A model that has taken its place, with a fresh optimizer in a place of its own kind; see
    /// [`OptimizerKind::placed`](crate::train::OptimizerKind::placed).
    ///
    /// # Errors
    /// If the optimizer cannot train so or the memory cannot be had.
    pub fn placed(model: Model, config: OptimizerConfig, placement: Placement) -> Result<Self> {
        let placement = config.kind.placed(placement)?;
        let optimizer = Optimizer::new(config, &model, &placement)?;
        let grads = Gradients::new(&placement, &model.trained_layouts())?;
        let mode = Train { grads, copy: None, cache: None, sent_bytes: 0 };
        Ok(Self { model, optimizer, placement, switching: SwitchConfig::default(), mode })
    }

    /// Changes how the engine switches.
    #[must_use]
    pub fn switching(mut self, config: SwitchConfig) -> Self {
        self.switching = config;
        self
    }

    pub(crate) fn optimizer_mut(&mut self) -> &mut Optimizer {
        &mut self.optimizer
    }

    /// Accumulated gradients: sums, until [`Engine::step`] divides and clears them.
    pub fn grads(&self) -> &Gradients {
        &self.mode.grads
    }

    /// Accumulates the gradient of a loss on log-probabilities of one micro-batch, on one rank; see
    /// [`crate::model::Trace::backward_log_probs`].
    ///
    /// # Errors
    /// If the batch does not fit the model or the loss fails.
    pub fn accumulate_log_probs(
        &mut self,
        batch: &Packed,
        rows: &[u32],
        labels: &[u32],
        dropout: Option<Dropout>,
        recompute: Recompute,
        loss: impl FnOnce(&LogProbs) -> Result<Tensor>,
    ) -> Result<(f64, LogProbs)> {
        self.mode.grads.set_reduction(self.optimizer.reduction());
        let trace = self.model.trace(batch, rows, dropout, recompute)?;
        trace.backward_log_probs(labels, &mut self.mode.grads, loss)?.ok_or_else(Error::not_last_stage)
    }

    /// Accumulates the gradient of a loss on scores of one micro-batch, on one rank; see
    /// [`crate::model::Trace::backward_scores`].
    ///
    /// # Errors
    /// If the batch does not fit the model or the loss fails.
    pub fn accumulate_scores(
        &mut self,
        batch: &Packed,
        rows: &[u32],
        dropout: Option<Dropout>,
        recompute: Recompute,
        loss: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<(f64, Tensor)> {
        self.mode.grads.set_reduction(self.optimizer.reduction());
        let trace = self.model.trace(batch, rows, dropout, recompute)?;
        trace.backward_scores(&mut self.mode.grads, loss)?.ok_or_else(Error::not_last_stage)
    }

    /// Accumulates the gradient of a loss on the log-probabilities of many micro-batches.
    ///
    /// `passes` are this rank's: round by round, one for each of its lanes, `None` where a lane has no rows; every rank has
    /// equally many. `loss` is called with the number of the pass on the last stage of the pipeline, and what it and the
    /// model say is returned there; other stages get `None`.
    ///
    /// # Errors
    /// If a batch does not fit the model, the loss fails or ranks have lost each other.
    pub fn accumulate_all_log_probs(
        &mut self,
        passes: &[Option<MicroBatch>],
        recompute: Recompute,
        mut loss: impl FnMut(usize, &LogProbs) -> Result<Tensor>,
    ) -> Result<Vec<Option<(f64, LogProbs)>>> {
        self.accumulate_all(passes, recompute, |pass, trace, micro_batch, grads| {
            trace.backward_log_probs(&micro_batch.labels, grads, |out| loss(pass, out))
        })
    }

    /// As [`Self::accumulate_all_log_probs`], of the negative log-likelihood of the labels, to the bit, in less time; see
    /// [`crate::model::Trace::backward_nll`].
    ///
    /// # Errors
    /// As there.
    pub fn accumulate_all_nll(
        &mut self,
        passes: &[Option<MicroBatch>],
        recompute: Recompute,
    ) -> Result<Vec<Option<(f64, LogProbs)>>> {
        self.accumulate_all(passes, recompute, |_, trace, micro_batch, grads| {
            trace.backward_nll(&micro_batch.labels, grads)
        })
    }

    /// As [`Self::accumulate_all_log_probs`], of a loss on scores.
    ///
    /// # Errors
    /// As there.
    pub fn accumulate_all_scores(
        &mut self,
        passes: &[Option<MicroBatch>],
        recompute: Recompute,
        mut loss: impl FnMut(usize, &Tensor) -> Result<Tensor>,
    ) -> Result<Vec<Option<(f64, Tensor)>>> {
        self.accumulate_all(passes, recompute, |pass, trace, _, grads| {
            trace.backward_scores(grads, |out| loss(pass, out))
        })
    }

    /// Runs all passes and their backwards, each of which says something on the last stage of the pipeline.
    fn accumulate_all<T>(
        &mut self,
        passes: &[Option<MicroBatch>],
        recompute: Recompute,
        backward: impl FnMut(usize, Trace<'_>, &MicroBatch, &mut Gradients) -> Result<Option<T>>,
    ) -> Result<Vec<Option<T>>> {
        self.mode.grads.set_reduction(self.optimizer.reduction());
        self.metered(|engine| schedule::run(&engine.model, &mut engine.mode.grads, passes, recompute, backward))
    }

    /// Norm of the accumulated gradient over `denominator` terms, before clipping.
    ///
    /// # Errors
    /// If ranks have lost each other.
    pub fn grad_norm(&mut self, denominator: f64) -> Result<f64> {
        let pipeline = self.placement.parallel.pipeline.world().clone();
        let before = pipeline.traffic();
        self.mode.grads.join_stages()?;
        self.mode.sent_bytes += pipeline.traffic().since(before).sent_bytes;
        self.mode.grads.norm(denominator)
    }

    /// Runs `call` and counts what this rank sends to its data-parallel peers meanwhile.
    fn metered<R>(&mut self, call: impl FnOnce(&mut Self) -> Result<R>) -> Result<R> {
        let data = self.placement.parallel.data.world().clone();
        let before = data.traffic();
        let result = call(self);
        self.mode.sent_bytes += data.traffic().since(before).sent_bytes;
        result
    }

    /// Brings the weights of all ranks together where ranks make steps by themselves ([`OptimizerKind::ZeroOneAdam`]); does
    /// nothing otherwise. All ranks call it together, before weights are exported or compared. It is an exchange that the
    /// schedule did not plan, so training goes on otherwise than without it.
    ///
    /// [`OptimizerKind::ZeroOneAdam`]: crate::train::OptimizerKind::ZeroOneAdam
    ///
    /// # Errors
    /// If gradients wait for a step or ranks have lost each other.
    pub fn join_ranks(&mut self) -> Result<()> {
        if self.mode.grads.is_pending() {
            return Err(Error::PendingGradients);
        }
        self.optimizer.join(&self.model)
    }

    /// One optimizer step on the accumulated gradient, a sum over `denominator` terms; clears it.
    ///
    /// A gradient that is not finite leaves weights, moments and step count as they are.
    ///
    /// # Errors
    /// If ranks have lost each other.
    pub fn step(&mut self, denominator: f64) -> Result<StepOutcome> {
        let grad_norm = self.grad_norm(denominator)?;
        let outcome =
            self.metered(|engine| engine.optimizer.apply(&engine.model, &engine.mode.grads, denominator, grad_norm))?;
        let wire_bytes = self.mode.sent_bytes;
        self.clear_grads()?;
        Ok(StepOutcome { wire_bytes, ..outcome })
    }

    /// What [`Self::step`] would report, without a step: weights, moments and step count stay; clears the gradient.
    ///
    /// # Errors
    /// If ranks have lost each other.
    pub fn skip(&mut self, denominator: f64) -> Result<StepOutcome> {
        let grad_norm = self.grad_norm(denominator)?;
        let lr = self.optimizer.config().schedule.lr(self.optimizer.step() + 1);
        let wire_bytes = self.mode.sent_bytes;
        self.clear_grads()?;
        Ok(StepOutcome { lr, grad_norm, applied: false, wire_bytes })
    }

    /// Forgets the accumulated gradient.
    ///
    /// # Errors
    /// If the tensor library refuses.
    pub fn clear_grads(&mut self) -> Result<()> {
        self.mode.sent_bytes = 0;
        self.mode.grads.clear()
    }

    /// Switches to generation: frees the gradients, lays the weights out, makes room for the cache. Before that ranks come
    /// together; see [`Self::join_ranks`].
    ///
    /// # Errors
    /// If gradients are still waiting for a step, the memory cannot be had, or ranks have lost each other.
    pub fn into_generate(mut self, size: CacheSize) -> Result<(Engine<Generate>, SwitchReport)> {
        let start = Instant::now();
        self.join_ranks()?;
        let Train { grads, copy, cache, .. } = self.mode;
        drop(grads);
        let mut allocated_bytes = 0;
        let weights = self.switching.weights;
        let (model, moved_bytes) = if weights == WeightFormat::Precision && self.model.generates_in_place() {
            (self.model.clone(), 0)
        } else {
            let is_new = copy.is_none();
            let (model, moved) = self.model.inference_copy(copy, self.switching.gather_units, weights)?;
            allocated_bytes += if is_new { model.computed_bytes()? as u64 } else { 0 };
            (model, moved)
        };
        let cache = match cache.filter(|cache| cache.holds(size)) {
            Some(cache) => cache,
            None => {
                let cache = KvCache::new(&model, size)?;
                allocated_bytes += cache.size_bytes() as u64;
                cache
            }
        };
        model.keep_packed(true);
        let Self { model: trained, optimizer, placement, switching, .. } = self;
        let engine = Engine { model: trained, optimizer, placement, switching, mode: Generate { model, cache } };
        Ok((engine, SwitchReport { moved_bytes, allocated_bytes, elapsed: start.elapsed() }))
    }
}

impl Engine<Generate> {
    /// The weights as they are laid out for generation.
    pub fn inference_model(&self) -> &Model {
        &self.mode.model
    }

    /// Answers all requests; see [`Scheduler`]. Ranks that generate together bring the same requests and get the same answers.
    ///
    /// # Errors
    /// If a request does not fit the model or the cache.
    pub fn generate(
        &mut self,
        requests: &[Request],
        key: SamplingKey,
        prefill_tokens: usize,
        on_token: OnToken<'_>,
    ) -> Result<Vec<Completion>> {
        Scheduler::new(&self.mode.model, &self.mode.cache, key, prefill_tokens).run(requests, on_token)
    }

    /// Switches to training: lets go of the copy and the cache, unless they are to be kept, and makes room for gradients.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn into_train(self) -> Result<(Engine<Train>, SwitchReport)> {
        let start = Instant::now();
        let Self { model, optimizer, placement, switching, mode: Generate { model: copy, cache } } = self;
        copy.keep_packed(false);
        let is_reusable = switching.weights == WeightFormat::Precision && !model.generates_in_place();
        let copy = (switching.pin_parameters && is_reusable).then_some(copy);
        let cache = (!switching.release_inference_cache).then_some(cache);
        let grads = Gradients::new(&placement, &model.trained_layouts())?;
        let allocated_bytes = grads.size_bytes();
        let mode = Train { grads, copy, cache, sent_bytes: 0 };
        let engine = Engine { model, optimizer, placement, switching, mode };
        Ok((engine, SwitchReport { moved_bytes: 0, allocated_bytes, elapsed: start.elapsed() }))
    }
}
