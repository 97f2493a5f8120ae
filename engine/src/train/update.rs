//! One step under way: what all optimizers need of it, and the pieces that several of them are made of.

use std::ops::Range;

use tandem_kernels::optimizer::onebit::{apply_slice, momentum_slice, variance_slice};

use super::OptimizerConfig;
use crate::Result;
use crate::model::Model;
use crate::parallel::Gradients;

/// A step under way.
pub(super) struct Update<'a> {
    pub(super) config: &'a OptimizerConfig,
    pub(super) model: &'a Model,
    pub(super) grads: &'a Gradients,
    /// Counted from 1.
    pub(super) step: u64,
    pub(super) lr: f64,
    /// What gradients are multiplied by: sums become means, clipped.
    pub(super) scale: f32,
}

impl Update<'_> {
    /// Calls `change` with this rank's slice of the weights of a unit.
    pub(super) fn change<R>(&self, unit: usize, change: impl FnOnce(&mut [f32]) -> R) -> Result<R> {
        self.model.trained().change(unit, self.grads.slicing(unit), self.grads.rank(), change)
    }

    /// The ranges of this rank's slice of a unit, each with its weight decay.
    pub(super) fn ranges(&self, unit: usize) -> Vec<(Range<usize>, f64)> {
        let slice = self.grads.slicing(unit).range(self.grads.rank());
        let mut ranges = Vec::new();
        for (range, decay) in self.model.trained_layouts()[unit].decay_ranges() {
            let (start, end) = (range.start.max(slice.start), range.end.min(slice.end));
            if start < end {
                let weight_decay = if decay { self.config.weight_decay } else { 0.0 };
                ranges.push((start - slice.start..end - slice.start, weight_decay));
            }
        }
        ranges
    }

    /// `m ← β₁ m + (1 − β₁) g`.
    pub(super) fn momentum(&self, unit: usize, m: &mut [f32]) -> Result<()> {
        Ok(self.grads.with_slice(unit, |grad| momentum_slice(m, grad, self.config.beta1, self.scale))??)
    }

    /// `v ← β₂ v + (1 − β₂) g²`.
    pub(super) fn variance(&self, unit: usize, v: &mut [f32]) -> Result<()> {
        Ok(self.grads.with_slice(unit, |grad| variance_slice(v, grad, self.config.beta2, self.scale))??)
    }

    /// `p ← p − lr (m / (√v + eps) + weight_decay · p)`: Adam without bias correction.
    pub(super) fn adam(&self, unit: usize, m: &[f32], v: &[f32]) -> Result<()> {
        self.change(unit, |weights| {
            for (range, decay) in self.ranges(unit) {
                let (m, v) = (&m[range.clone()], &v[range.clone()]);
                apply_slice(&mut weights[range], m, v, self.lr, self.config.eps, decay)?;
            }
            Ok(())
        })?
    }
}
