//! 0/1 Adam (Lu et al., ICLR 2023; DeepSpeed's `ZeroOneAdam`).
//!
//! Until the freeze, on steps of exact sums `m` and `v` are updated as by Adam; on the others
//!
//! ```text
//! g ← mean of signs over the ranks of g of the rank, 0 where v = 0;   m ← β₁ m + (1 − β₁) g;   v stays
//! ```
//!
//! and always `p ← p − lr (m / (√v + eps) + weight_decay · p)`. Afterwards a rank makes steps by itself, from the weights `p₀`
//! that all ranks had at the last exchange:
//!
//! ```text
//! m ← β₁ m + (1 − β₁) g of the rank, 0 where v = 0;   a ← a − lr m / (√v + eps);   p = D p₀ + a
//! exchange:  a ← mean of signs over the ranks of a (√v + eps), 0 where v = 0
//!            m ← −a / (sum of lr);   p = D p₀ + a / (√v + eps);   p₀ ← p;   a ← 0
//! ```
//!
//! with `D` the product of `1 − lr · weight_decay` since then. Two things differ from DeepSpeed: it takes the local steps
//! back by subtracting them, which rounds differently on every rank, so that weights drift apart; here `p₀` is kept.
//! And its weight decay enters the momentum at every exchange; here it stays decoupled.

use tandem_kernels::optimizer::onebit::{apply_slice, momentum_slice};

use super::exchange::{Exchange, LocalBuffer};
use super::zero_where_no_variance;
use crate::Result;
use crate::model::Model;
use crate::parallel::{Reduction, SliceBuffer, Slicing};
use crate::train::kind::joins_ranks;
use crate::train::update::Update;
use crate::train::{OptimizerConfig, OptimizerKind};

/// The steps that this rank makes by itself.
#[derive(Debug)]
pub(crate) struct LocalSteps {
    kind: OptimizerKind,
    exchange: Exchange,
    /// `p₀` by unit.
    anchor: Vec<SliceBuffer>,
    /// `a` by unit.
    moved: Vec<SliceBuffer>,
    /// The step after which ranks last had the same weights.
    joined: u64,
}

impl LocalSteps {
    pub(super) fn new(
        kind: OptimizerKind,
        exchange: Exchange,
        anchor: Vec<SliceBuffer>,
        moved: Vec<SliceBuffer>,
    ) -> Self {
        Self { kind, exchange, anchor, moved, joined: 0 }
    }

    fn freeze_steps(&self) -> u64 {
        match self.kind {
            OptimizerKind::ZeroOneAdam { freeze_steps, .. } => freeze_steps,
            _ => u64::MAX,
        }
    }

    /// Whether the second moment has been frozen by step `step`.
    pub(super) fn is_frozen(&self, step: u64) -> bool {
        step > self.freeze_steps()
    }

    /// Whether ranks have other weights than each other after step `step`.
    pub(super) fn are_apart(&self, step: u64) -> bool {
        self.is_frozen(step) && step > self.joined
    }

    /// The weights that all ranks had last, by unit.
    pub(crate) fn anchor(&self) -> &[SliceBuffer] {
        &self.anchor
    }

    pub(super) fn buffers(&self) -> impl Iterator<Item = &SliceBuffer> {
        self.anchor.iter().chain(&self.moved)
    }

    /// The step after which ranks last had the same weights.
    pub(crate) fn joined(&self) -> u64 {
        self.joined
    }

    pub(super) fn step(
        &mut self,
        update: &Update<'_>,
        first: &mut [SliceBuffer],
        second: &mut [SliceBuffer],
    ) -> Result<()> {
        if !self.is_frozen(update.step) {
            return self.step_together(update, first, second);
        }
        if update.step == self.freeze_steps() + 1 {
            self.exchange.reset();
            self.start(update.model, update.step - 1)?;
        }
        for (unit, (m, v)) in first.iter_mut().zip(second.iter()).enumerate() {
            update.momentum(unit, m)?;
            zero_where_no_variance(m, v);
            apply_slice(&mut self.moved[unit], m, v, update.lr, update.config.eps, 0.0)?;
        }
        let OptimizerKind::ZeroOneAdam { freeze_steps, steps_per_local_interval, max_local_steps, .. } = self.kind
        else {
            return Ok(());
        };
        if joins_ranks(update.step, freeze_steps, steps_per_local_interval, max_local_steps) {
            self.join(update.config, update.model, update.step, first, second)
        } else {
            self.place(update.config, update.model, update.step)
        }
    }

    fn step_together(
        &mut self,
        update: &Update<'_>,
        first: &mut [SliceBuffer],
        second: &mut [SliceBuffer],
    ) -> Result<()> {
        for (unit, (m, v)) in first.iter_mut().zip(second).enumerate() {
            if update.grads.reduction() == Reduction::Every {
                update.momentum(unit, m)?;
                update.variance(unit, v)?;
            } else {
                let mut mean = update.grads.with_slice(unit, <[f32]>::to_vec)?;
                mean.iter_mut().for_each(|grad| *grad *= update.scale);
                self.exchange.mean(unit, "signs of gradients", &mut mean)?;
                zero_where_no_variance(&mut mean, v);
                momentum_slice(m, &mean, update.config.beta1, 1.0)?;
            }
            update.adam(unit, m, v)?;
        }
        Ok(())
    }

    /// All ranks have the same weights after step `step`: steps of their own start from them.
    fn start(&mut self, model: &Model, step: u64) -> Result<()> {
        for (unit, (anchor, moved)) in self.anchor.iter_mut().zip(&mut self.moved).enumerate() {
            let slicing = Slicing { len: anchor.len(), ranks: 1 };
            model.trained().read(unit, slicing, 0, |weights| anchor.copy_from_slice(weights))?;
            moved.fill(0.0);
        }
        self.joined = step;
        Ok(())
    }

    /// Brings ranks together after step `step`.
    pub(crate) fn join(
        &mut self,
        config: &OptimizerConfig,
        model: &Model,
        step: u64,
        first: &mut [SliceBuffer],
        second: &[SliceBuffer],
    ) -> Result<()> {
        let lr_sum: f64 = (self.joined + 1..=step).map(|step| config.schedule.lr(step)).sum();
        // A learning rate of 0, as at the end of some schedules, has moved nothing, and its steps say nothing of the momentum.
        if lr_sum > 0.0 {
            let (eps, to_momentum) = (config.eps as f32, (-1.0 / lr_sum) as f32);
            for (unit, (m, v)) in first.iter_mut().zip(second).enumerate() {
                let moved = &mut self.moved[unit];
                for (moved, v) in moved.iter_mut().zip(v.iter()) {
                    *moved *= v.sqrt() + eps;
                }
                self.exchange.mean(unit, "signs of steps", moved)?;
                zero_where_no_variance(moved, v);
                for ((moved, m), v) in moved.iter_mut().zip(m.iter_mut()).zip(v.iter()) {
                    *m = *moved * to_momentum;
                    *moved /= v.sqrt() + eps;
                }
            }
        }
        self.place(config, model, step)?;
        self.start(model, step)
    }

    /// Sets the weights to where this rank has come to after step `step`: `D p₀ + a`.
    fn place(&self, config: &OptimizerConfig, model: &Model, step: u64) -> Result<()> {
        let decay = |step: u64| 1.0 - config.schedule.lr(step) * config.weight_decay;
        let keep = (self.joined + 1..=step).map(decay).product::<f64>() as f32;
        for (unit, layout) in model.trained_layouts().iter().enumerate() {
            let (anchor, moved) = (&self.anchor[unit], &self.moved[unit]);
            model.trained().change(unit, Slicing { len: layout.len(), ranks: 1 }, 0, |weights| {
                for (range, decays) in layout.decay_ranges() {
                    let keep = if decays { keep } else { 1.0 };
                    let from = anchor[range.clone()].iter().zip(&moved[range.clone()]);
                    for (weight, (anchor, moved)) in weights[range].iter_mut().zip(from) {
                        *weight = anchor * keep + moved;
                    }
                }
            })?;
        }
        Ok(())
    }

    /// After weights, moments and what [`Self::local`] names were read of a checkpoint of step `step`; `joined` is the step
    /// after which ranks last had the same weights, if those steps were read too.
    pub(crate) fn resume(
        &mut self,
        config: &OptimizerConfig,
        model: &Model,
        step: u64,
        joined: Option<u64>,
    ) -> Result<()> {
        if !self.is_frozen(step) {
            return Ok(());
        }
        let Some(joined) = joined else { return self.start(model, step) };
        for (unit, anchor) in self.anchor.iter_mut().enumerate() {
            let slicing = Slicing { len: anchor.len(), ranks: 1 };
            model.trained().read(unit, slicing, 0, |weights| anchor.copy_from_slice(weights))?;
        }
        self.joined = joined;
        if joined == step { Ok(()) } else { self.place(config, model, step) }
    }

    pub(super) fn local(&self, step: u64) -> Vec<LocalBuffer<'_>> {
        let mut buffers = self.exchange.local();
        if self.is_frozen(step) {
            let moved = self.moved.iter().zip(self.exchange.layouts());
            buffers.extend(moved.map(|(values, layout)| LocalBuffer { what: "moved", unit: layout.id, values }));
        }
        buffers
    }

    /// In the order of [`Self::local`].
    pub(super) fn local_mut(&mut self, step: u64) -> Vec<&mut [f32]> {
        let is_frozen = self.is_frozen(step);
        let mut buffers = self.exchange.local_mut();
        if is_frozen {
            buffers.extend(self.moved.iter_mut().map(|moved| &mut moved[..]));
        }
        buffers
    }
}
