//! The optimizer over this rank's slices of all units, with one global gradient norm.

use serde::{Deserialize, Serialize};

use super::compressed::{Compressed, LocalBuffer, LocalSteps};
use super::update::Update;
use super::{OptimizerKind, Schedule};
use crate::Result;
use crate::model::Model;
use crate::parallel::{Gradients, Offload, Placement, Reduction, SliceBuffer, Slicing, ZeroStage};

/// Knobs of the optimizer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct OptimizerConfig {
    /// The method, and what ranks exchange.
    #[serde(default)]
    pub kind: OptimizerKind,
    /// Learning rate by step.
    pub schedule: Schedule,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay of matrices; norms and biases have none.
    pub weight_decay: f64,
    /// Gradients of a larger global norm are scaled down to it; 0 switches clipping off. Of gradients that are not added up
    /// over the ranks, see [`Gradients::norm`].
    pub max_grad_norm: f64,
}

/// Optimizer state: moments of each unit, or this rank's slices of them, and the number of steps taken; for kinds that
/// compress, also what this rank has not yet told the others.
#[derive(Debug)]
pub struct Optimizer {
    config: OptimizerConfig,
    step: u64,
    first: Vec<SliceBuffer>,
    second: Vec<SliceBuffer>,
    compressed: Compressed,
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepOutcome {
    /// Learning rate used.
    pub lr: f64,
    /// Global norm of the gradient before clipping; see [`Gradients::norm`].
    pub grad_norm: f64,
    /// Whether the weights moved; a gradient that is not finite moves nothing.
    pub applied: bool,
    /// Bytes that this rank has sent to data-parallel peers for this step, its passes included: gradients or momenta, and
    /// weights; and between the two ends of a pipeline, the gradient of what both hold.
    pub wire_bytes: u64,
}

/// How this placement cuts optimizer state.
pub(crate) fn slicing(len: usize, placement: &Placement) -> Slicing {
    let ranks = if placement.stage == ZeroStage::Zero { 1 } else { placement.parallel.data.size() };
    Slicing { len, ranks }
}

/// Which slice of optimizer state is this rank's.
pub(crate) fn slice_rank(placement: &Placement) -> usize {
    if placement.stage == ZeroStage::Zero { 0 } else { placement.parallel.data.rank() }
}

impl Optimizer {
    /// A fresh optimizer for what this rank holds of `model`, in a place that [`OptimizerKind::placed`] has given.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn new(config: OptimizerConfig, model: &Model, placement: &Placement) -> Result<Self> {
        let dir = match placement.offload {
            Offload::None => None,
            Offload::Optimizer | Offload::All => placement.offload_dir.as_deref(),
        };
        let layouts = model.trained_layouts();
        let zeros = || {
            let buffers = layouts.iter().map(|layout| SliceBuffer::zeros(slicing(layout.len(), placement).each(), dir));
            buffers.collect::<Result<Vec<_>>>()
        };
        // A vote of signs has no second moment.
        let second = if matches!(config.kind, OptimizerKind::SignSgd { .. }) { Vec::new() } else { zeros()? };
        let compressed = Compressed::new(config.kind, model, placement, zeros)?;
        Ok(Self { config, step: 0, first: zeros()?, second, compressed })
    }

    /// Sets the step and this rank's slices of the moments to what was saved.
    pub(crate) fn restore(
        &mut self,
        step: u64,
        fill: impl FnOnce([&mut [SliceBuffer]; 2]) -> Result<()>,
    ) -> Result<()> {
        self.step = step;
        fill([&mut self.first, &mut self.second])
    }

    /// Lets go of whatever is in files; see [`SliceBuffer::let_go`].
    pub(crate) fn let_go(&self) {
        self.first.iter().chain(&self.second).chain(self.compressed.buffers()).for_each(SliceBuffer::let_go);
    }

    /// What becomes of the gradients of the next step.
    pub(crate) fn reduction(&self) -> Reduction {
        self.config.kind.reduction(self.step + 1)
    }

    /// Everything that only this rank has: in one order, equally long on all ranks.
    pub(crate) fn local(&self, model: &Model) -> Vec<LocalBuffer<'_>> {
        let mut buffers = Vec::new();
        if self.has_local_moments() {
            for (values, layout) in self.first.iter().zip(model.trained_layouts()) {
                buffers.push(LocalBuffer { what: "momentum", unit: layout.id, values });
            }
        }
        buffers.extend(self.compressed.local(self.step));
        buffers
    }

    /// In the order of [`Self::local`].
    pub(crate) fn local_mut(&mut self) -> Vec<&mut [f32]> {
        let mut buffers: Vec<&mut [f32]> = Vec::new();
        if self.has_local_moments() {
            buffers.extend(self.first.iter_mut().map(|first| &mut first[..]));
        }
        buffers.extend(self.compressed.local_mut(self.step));
        buffers
    }

    /// The step after which ranks last had the same weights.
    pub(crate) fn joined(&self) -> u64 {
        self.local_steps().map_or(self.step, LocalSteps::joined)
    }

    /// Whether ranks have other first moments than each other.
    pub(crate) fn has_local_moments(&self) -> bool {
        self.compressed.has_local_moments(self.step)
    }

    /// The steps that this rank has made by itself, if there are any since the weights were last the same on all ranks.
    pub(crate) fn local_steps(&self) -> Option<&LocalSteps> {
        self.compressed.local_steps(self.step)
    }

    /// After all else was restored: `joined` is the step after which ranks last had the same weights, or `None` if what
    /// [`Self::local`] names was not restored.
    pub(crate) fn resume(&mut self, model: &Model, joined: Option<u64>) -> Result<()> {
        let (config, step) = (self.config, self.step);
        let resumed =
            self.compressed.local_steps_mut().map_or(Ok(()), |steps| steps.resume(&config, model, step, joined));
        self.let_go();
        resumed
    }

    /// Brings the weights of ranks that have made steps by themselves together.
    pub(crate) fn join(&mut self, model: &Model) -> Result<()> {
        if self.local_steps().is_none() {
            return Ok(());
        }
        let Self { config, step, first, second, compressed } = self;
        let joined =
            compressed.local_steps_mut().map_or(Ok(()), |steps| steps.join(config, model, *step, first, second));
        self.let_go();
        joined
    }

    /// Its knobs.
    pub fn config(&self) -> &OptimizerConfig {
        &self.config
    }

    /// Steps taken.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// First moments by unit: this rank's slices.
    pub fn first_moments(&self) -> &[SliceBuffer] {
        &self.first
    }

    /// Second moments by unit: this rank's slices; none for [`OptimizerKind::SignSgd`].
    pub fn second_moments(&self) -> &[SliceBuffer] {
        &self.second
    }

    /// One step on gradients that are sums over `denominator` terms, whose mean has the norm `grad_norm`. Whoever counts bytes
    /// adds them to the outcome.
    ///
    /// # Errors
    /// If ranks have lost each other.
    pub fn apply(&mut self, model: &Model, grads: &Gradients, denominator: f64, grad_norm: f64) -> Result<StepOutcome> {
        let lr = self.config.schedule.lr(self.step + 1);
        if !grad_norm.is_finite() {
            return Ok(StepOutcome { lr, grad_norm, applied: false, wire_bytes: 0 });
        }
        self.step += 1;
        let clip = match self.config.max_grad_norm {
            limit if limit > 0.0 && grad_norm > limit => limit / grad_norm,
            _ => 1.0,
        };
        // The mean over the ranks of what each has added up by itself has to come out as the mean over all terms.
        let ranks = match grads.reduction() {
            Reduction::Every => 1,
            Reduction::Never => model.parallel().data.size(),
        };
        let scale = (clip * ranks as f64 / denominator) as f32;
        let update = Update { config: &self.config, model, grads, step: self.step, lr, scale };
        self.compressed.step(&update, &mut self.first, &mut self.second)?;
        self.let_go();
        model.trained().spread(model.parallel(), grads.slicing(0).ranks)?;
        Ok(StepOutcome { lr, grad_norm, applied: true, wire_bytes: 0 })
    }
}
