//! AdamW over the flat buffers of all units, with one global gradient norm.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use tandem_kernels::optimizer::{AdamWConfig, adamw_step};
use tandem_kernels::reduce;

use super::Schedule;
use crate::Result;
use crate::model::unit::UnitBuffer;

/// Knobs of the optimizer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct OptimizerConfig {
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
    /// Gradients of a larger global norm are scaled down to it; 0 switches clipping off.
    pub max_grad_norm: f64,
}

/// AdamW state: two moments per unit and the number of steps taken.
#[derive(Clone, Debug)]
pub struct Optimizer {
    config: OptimizerConfig,
    step: u64,
    first: Vec<UnitBuffer>,
    second: Vec<UnitBuffer>,
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepOutcome {
    /// Learning rate used.
    pub lr: f64,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Whether the weights moved; a gradient that is not finite moves nothing.
    pub applied: bool,
}

impl Optimizer {
    /// A fresh optimizer for units like `units`.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn new(config: OptimizerConfig, units: &[UnitBuffer]) -> Result<Self> {
        let zeros = || units.iter().map(|unit| UnitBuffer::zeros(unit.layout())).collect::<Result<Vec<_>>>();
        Ok(Self { config, step: 0, first: zeros()?, second: zeros()? })
    }

    /// An optimizer as it was saved.
    pub fn from_parts(config: OptimizerConfig, step: u64, first: Vec<UnitBuffer>, second: Vec<UnitBuffer>) -> Self {
        Self { config, step, first, second }
    }

    /// Its knobs.
    pub fn config(&self) -> &OptimizerConfig {
        &self.config
    }

    /// Steps taken.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// First moments by unit.
    pub fn first_moments(&self) -> &[UnitBuffer] {
        &self.first
    }

    /// Second moments by unit.
    pub fn second_moments(&self) -> &[UnitBuffer] {
        &self.second
    }

    /// Global norm of the mean gradient: the root of the sum of squares over all units, divided by `denominator`.
    ///
    /// # Errors
    /// If the tensor library refuses.
    pub fn grad_norm(grads: &[UnitBuffer], denominator: f64) -> Result<f64> {
        let mut squares = 0.0;
        for unit in grads {
            squares += reduce::sum_squares(unit.flat())?;
        }
        Ok(squares.sqrt() / denominator)
    }

    /// One step on gradients that are sums over `denominator` terms, whose mean has the norm `grad_norm`.
    ///
    /// # Errors
    /// If the tensor library refuses.
    pub fn apply(
        &mut self,
        weights: &[UnitBuffer],
        grads: &[UnitBuffer],
        denominator: f64,
        grad_norm: f64,
    ) -> Result<StepOutcome> {
        let lr = self.config.schedule.lr(self.step + 1);
        if !grad_norm.is_finite() {
            return Ok(StepOutcome { lr, grad_norm, applied: false });
        }
        self.step += 1;
        let clip = match self.config.max_grad_norm {
            limit if limit > 0.0 && grad_norm > limit => limit / grad_norm,
            _ => 1.0,
        };
        let scale = (clip / denominator) as f32;
        let adamw = AdamWConfig { beta1: self.config.beta1, beta2: self.config.beta2, eps: self.config.eps };
        for (index, unit) in weights.iter().enumerate() {
            for (start, len, decay) in unit.layout().decay_ranges() {
                let part = |buffer: &UnitBuffer| -> Result<Tensor> { Ok(buffer.flat().narrow(0, start, len)?) };
                let weight_decay = if decay { self.config.weight_decay } else { 0.0 };
                adamw_step(
                    &part(unit)?,
                    &part(&grads[index])?,
                    &part(&self.first[index])?,
                    &part(&self.second[index])?,
                    lr,
                    weight_decay,
                    self.step,
                    scale,
                    &adamw,
                )?;
            }
        }
        Ok(StepOutcome { lr, grad_norm, applied: true })
    }
}
