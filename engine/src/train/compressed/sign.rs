//! Signum with majority vote (Bernstein et al., "signSGD with majority vote", ICLR 2019), with or without error feedback.
//!
//! ```text
//! m ← β₁ m + (1 − β₁) g of the rank
//! x = m + e                                    e: what this rank's votes have left out so far, if there is feedback
//! e ← x − mean |x| · sign(x)
//! p ← p · (1 − lr · weight_decay) − lr · majority over the ranks of sign(x)
//! ```
//!
//! One bit has no zero, and a vote of an even number of ranks has ties. Both count as `+` in odd steps and as `−` in even
//! ones, so neither moves a parameter anywhere in the long run: what has no gradient stays within one learning rate.

use std::sync::Arc;

use tandem_collective::compress::sign_majority;
use tandem_kernels::optimizer::sign_sgd_slice;

use super::exchange::{LocalBuffer, pack, unpack};
use crate::Result;
use crate::model::Model;
use crate::model::unit::UnitLayout;
use crate::parallel::{Group, Placement, SliceBuffer};
use crate::train::update::Update;

/// The ranks, and what their votes have left out.
#[derive(Debug)]
pub(in crate::train) struct Votes {
    data: Arc<Group>,
    layouts: Vec<Arc<UnitLayout>>,
    /// By unit, if there is feedback.
    left_out: Option<Vec<Vec<f32>>>,
}

impl Votes {
    pub(super) fn new(model: &Model, placement: &Placement, error_feedback: bool) -> Self {
        let layouts = model.trained_layouts();
        let zeros = || layouts.iter().map(|layout| vec![0.0; layout.parameters()]).collect();
        Self { data: placement.parallel.data.clone(), left_out: error_feedback.then(zeros), layouts }
    }

    pub(super) fn step(&mut self, update: &Update<'_>, first: &mut [SliceBuffer]) -> Result<()> {
        // Ties and zeros are `+` in the vote; turning all signs around it makes them `−`.
        let turn = if update.step.is_multiple_of(2) { -1.0 } else { 1.0 };
        for (unit, m) in first.iter_mut().enumerate() {
            update.momentum(unit, m)?;
            let layout = &self.layouts[unit];
            let mut vote = pack(layout, m);
            m.let_go();
            vote.iter_mut().for_each(|vote| *vote *= turn);
            if let Some(left_out) = &mut self.left_out {
                remember(&mut vote, &mut left_out[unit], turn);
            }
            sign_majority(&**self.data.world(), self.data.tag("votes on signs"), &mut vote)?;
            vote.iter_mut().for_each(|vote| *vote *= turn);
            let mut direction = vec![0.0; layout.len()];
            unpack(layout, &vote, &mut direction);
            update.change(unit, |weights| {
                for (range, decay) in update.ranges(unit) {
                    sign_sgd_slice(&mut weights[range.clone()], &direction[range], update.lr, decay)?;
                }
                Ok::<(), crate::Error>(())
            })??;
        }
        Ok(())
    }

    pub(super) fn local(&self) -> Vec<LocalBuffer<'_>> {
        let left_out = self.left_out.iter().flatten().zip(&self.layouts);
        left_out.map(|(values, layout)| LocalBuffer { what: "left_out", unit: layout.id, values }).collect()
    }

    /// In the order of [`Self::local`].
    pub(super) fn local_mut(&mut self) -> Vec<&mut [f32]> {
        self.left_out.iter_mut().flatten().map(Vec::as_mut_slice).collect()
    }
}

/// Adds to a vote what earlier ones have left out, and keeps what this one will; the vote is turned, what is kept is not.
fn remember(vote: &mut [f32], left_out: &mut [f32], turn: f32) {
    for (vote, left_out) in vote.iter_mut().zip(left_out.iter()) {
        *vote += turn * left_out;
    }
    let scale = mean_magnitude(vote);
    for (left_out, &vote) in left_out.iter_mut().zip(vote.iter()) {
        *left_out = turn * (vote - if vote >= 0.0 { scale } else { -scale });
    }
}

/// Magnitudes are summed in f64 in eight lanes, number `i` in lane `i % 8`, and the lanes from first to last: a fixed order
/// that vectorises.
fn mean_magnitude(values: &[f32]) -> f32 {
    let mut lanes = [0.0_f64; 8];
    for eight in values.chunks(8) {
        for (lane, &value) in lanes.iter_mut().zip(eight) {
            *lane += f64::from(value.abs());
        }
    }
    (lanes.iter().sum::<f64>() / values.len().max(1) as f64) as f32
}
