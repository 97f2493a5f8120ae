//! Optimizers whose ranks exchange about one bit for each parameter, and what a rank keeps for them that no other rank has.
//!
//! A unit is compressed as one: its parameters back to back, without the padding between them.

mod exchange;
mod one_bit;
mod sign;
mod zero_one;

use exchange::Exchange;
pub(crate) use exchange::LocalBuffer;
use sign::Votes;
pub(crate) use zero_one::LocalSteps;

use super::OptimizerKind;
use super::update::Update;
use crate::Result;
use crate::model::Model;
use crate::parallel::{Placement, SliceBuffer};

/// What one kind keeps beside moments.
#[derive(Debug)]
pub(super) enum Compressed {
    /// Nothing: AdamW.
    None,
    OneBit {
        exchange: Exchange,
        freeze_steps: u64,
    },
    ZeroOne(LocalSteps),
    Sign(Votes),
}

impl Compressed {
    /// Nothing exchanged yet; `zeros` makes a buffer for each unit.
    pub(super) fn new(
        kind: OptimizerKind,
        model: &Model,
        placement: &Placement,
        zeros: impl Fn() -> Result<Vec<SliceBuffer>>,
    ) -> Result<Self> {
        let exchange = || Exchange::new(model, placement);
        Ok(match kind {
            OptimizerKind::AdamW => Self::None,
            OptimizerKind::OneBitAdam { freeze_steps } => Self::OneBit { exchange: exchange(), freeze_steps },
            OptimizerKind::ZeroOneAdam { .. } => Self::ZeroOne(LocalSteps::new(kind, exchange(), zeros()?, zeros()?)),
            OptimizerKind::SignSgd { error_feedback } => Self::Sign(Votes::new(model, placement, error_feedback)),
        })
    }

    /// One step; `first` and `second` are whole.
    pub(super) fn step(
        &mut self,
        update: &Update<'_>,
        first: &mut [SliceBuffer],
        second: &mut [SliceBuffer],
    ) -> Result<()> {
        match self {
            Self::None => super::adamw::step(update, first, second),
            Self::OneBit { exchange, freeze_steps } => one_bit::step(update, exchange, *freeze_steps, first, second),
            Self::ZeroOne(steps) => steps.step(update, first, second),
            Self::Sign(votes) => votes.step(update, first),
        }
    }

    /// The steps that this rank has made by itself, if there are any since the weights were last the same on all ranks.
    pub(super) fn local_steps(&self, step: u64) -> Option<&LocalSteps> {
        match self {
            Self::ZeroOne(steps) if steps.are_apart(step) => Some(steps),
            _ => None,
        }
    }

    pub(super) fn local_steps_mut(&mut self) -> Option<&mut LocalSteps> {
        match self {
            Self::ZeroOne(steps) => Some(steps),
            _ => None,
        }
    }

    /// What is kept as moments are, in memory or in files.
    pub(super) fn buffers(&self) -> impl Iterator<Item = &SliceBuffer> {
        let steps = if let Self::ZeroOne(steps) = self { Some(steps) } else { None };
        steps.into_iter().flat_map(LocalSteps::buffers)
    }

    /// Whether ranks have first moments of their own after step `step`.
    pub(super) fn has_local_moments(&self, step: u64) -> bool {
        match self {
            Self::None | Self::OneBit { .. } => false,
            Self::ZeroOne(steps) => steps.is_frozen(step),
            Self::Sign(_) => true,
        }
    }

    /// Everything that only this rank has after step `step`, first moments excepted: in one order, equally long on all ranks.
    pub(super) fn local(&self, step: u64) -> Vec<LocalBuffer<'_>> {
        match self {
            Self::OneBit { exchange, freeze_steps } if step > *freeze_steps => exchange.local(),
            Self::None | Self::OneBit { .. } => Vec::new(),
            Self::ZeroOne(steps) => steps.local(step),
            Self::Sign(votes) => votes.local(),
        }
    }

    /// In the order of [`Self::local`].
    pub(super) fn local_mut(&mut self, step: u64) -> Vec<&mut [f32]> {
        match self {
            Self::OneBit { exchange, freeze_steps } if step > *freeze_steps => exchange.local_mut(),
            Self::None | Self::OneBit { .. } => Vec::new(),
            Self::ZeroOne(steps) => steps.local_mut(step),
            Self::Sign(votes) => votes.local_mut(),
        }
    }
}

/// One bit has no zero: what has never had a gradient gets none from an exchange.
fn zero_where_no_variance(values: &mut [f32], v: &[f32]) {
    for (value, &v) in values.iter_mut().zip(v) {
        if v == 0.0 {
            *value = 0.0;
        }
    }
}
