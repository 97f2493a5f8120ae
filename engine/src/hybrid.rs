//! One model in two modes, told apart by type: [`Engine<Train>`] ⇄ [`Engine<Generate>`].

use std::time::{Duration, Instant};

use candle_core::Tensor;

use crate::batch::Packed;
use crate::generate::{CacheSize, Completion, KvCache, OnToken, Request, SamplingKey, Scheduler};
use crate::model::unit::UnitBuffer;
use crate::model::{Dropout, LogProbs, Model, Recompute};
use crate::train::{Optimizer, OptimizerConfig, StepOutcome};
use crate::{Error, Result};

/// Mode in which weights are updated. Holds the gradients.
#[derive(Debug)]
pub struct Train {
    grads: Vec<UnitBuffer>,
}

/// Mode in which tokens are sampled. Holds the key-value cache.
#[derive(Debug)]
pub struct Generate {
    cache: KvCache,
}

/// A model with its optimizer, in one mode.
///
/// With one rank and one dtype, generation reads the training weights themselves: switching copies nothing. It frees the
/// gradients and makes room for the cache, or the other way round.
#[derive(Debug)]
pub struct Engine<Mode> {
    model: Model,
    optimizer: Optimizer,
    mode: Mode,
}

/// What a mode switch cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SwitchReport {
    /// Bytes of weights that moved between layouts.
    pub moved_bytes: u64,
    /// Bytes that the new mode allocated: the cache, or the gradients.
    pub allocated_bytes: u64,
    /// Time taken.
    pub elapsed: Duration,
}

impl<Mode> Engine<Mode> {
    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The optimizer.
    pub fn optimizer(&self) -> &Optimizer {
        &self.optimizer
    }

    /// Log-probabilities, the same in both modes; see [`Model::log_probs`].
    ///
    /// # Errors
    /// As [`Model::log_probs`].
    pub fn log_probs(&self, batch: &Packed, rows: &[u32], labels: &[u32]) -> Result<LogProbs> {
        self.model.log_probs(batch, rows, labels)
    }
}

impl Engine<Train> {
    /// A model with a fresh optimizer.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn new(model: Model, config: OptimizerConfig) -> Result<Self> {
        let optimizer = Optimizer::new(config, model.units())?;
        Self::with_optimizer(model, optimizer)
    }

    /// A model with an optimizer as it was saved.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn with_optimizer(model: Model, optimizer: Optimizer) -> Result<Self> {
        let grads = model.zeros_like_units()?;
        Ok(Self { model, optimizer, mode: Train { grads } })
    }

    /// Accumulated gradients by unit: sums, until [`Engine::step`] divides and clears them.
    pub fn grads(&self) -> &[UnitBuffer] {
        &self.mode.grads
    }

    /// Accumulates the gradient of a loss on log-probabilities; see [`crate::model::Trace::backward_log_probs`].
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
        self.model.trace(batch, dropout, recompute)?.backward_log_probs(rows, labels, &self.mode.grads, loss)
    }

    /// Accumulates the gradient of a loss on scores; see [`crate::model::Trace::backward_scores`].
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
        self.model.trace(batch, dropout, recompute)?.backward_scores(rows, &self.mode.grads, loss)
    }

    /// Norm of the accumulated gradient over `denominator` terms, before clipping.
    ///
    /// # Errors
    /// If the tensor library refuses.
    pub fn grad_norm(&self, denominator: f64) -> Result<f64> {
        Optimizer::grad_norm(&self.mode.grads, denominator)
    }

    /// One optimizer step on the accumulated gradient, a sum over `denominator` terms; clears it.
    ///
    /// A gradient that is not finite leaves weights, moments and step count as they are.
    ///
    /// # Errors
    /// If the tensor library refuses.
    pub fn step(&mut self, denominator: f64) -> Result<StepOutcome> {
        let grad_norm = self.grad_norm(denominator)?;
        let outcome = self.optimizer.apply(self.model.units(), &self.mode.grads, denominator, grad_norm)?;
        self.clear_grads()?;
        Ok(outcome)
    }

    /// Forgets the accumulated gradient, as when another model's step was skipped.
    ///
    /// # Errors
    /// If the tensor library refuses.
    pub fn clear_grads(&mut self) -> Result<()> {
        self.mode.grads.iter().try_for_each(UnitBuffer::clear)
    }

    /// Switches to generation: frees the gradients, makes room for the cache.
    ///
    /// # Errors
    /// If gradients are still waiting for a step, or the memory cannot be had.
    pub fn into_generate(self, size: CacheSize) -> Result<(Engine<Generate>, SwitchReport)> {
        let start = Instant::now();
        if Optimizer::grad_norm(&self.mode.grads, 1.0)? != 0.0 {
            return Err(Error::PendingGradients);
        }
        drop(self.mode);
        let cache = KvCache::new(self.model.spec(), size)?;
        let allocated_bytes = cache.size_bytes() as u64;
        let engine = Engine { model: self.model, optimizer: self.optimizer, mode: Generate { cache } };
        Ok((engine, SwitchReport { moved_bytes: 0, allocated_bytes, elapsed: start.elapsed() }))
    }
}

impl Engine<Generate> {
    /// Answers all requests; see [`Scheduler`].
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
        Scheduler::new(&self.model, &self.mode.cache, key, prefill_tokens).run(requests, on_token)
    }

    /// Switches to training: frees the cache, makes room for gradients.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn into_train(self) -> Result<(Engine<Train>, SwitchReport)> {
        let start = Instant::now();
        drop(self.mode);
        let engine = Engine::with_optimizer(self.model, self.optimizer)?;
        let allocated_bytes = 4 * engine.model.parameters() as u64;
        Ok((engine, SwitchReport { moved_bytes: 0, allocated_bytes, elapsed: start.elapsed() }))
    }
}
