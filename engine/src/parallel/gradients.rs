//! Adding up gradients: over the micro-batches of a lane, over lanes, over ranks.
//!
//! The rows of a step are dealt out to a fixed number of *lanes*, and each lane's rows are cut into micro-batches. Round `k` adds
//! up the `k`-th micro-batches of all lanes in a binary tree over the lanes; rounds are added one after the other. Rank `r` of
//! `n` computes the lanes `r`, `r + n`, …: what ranks add among themselves is the lower part of the tree, what a rank adds over
//! its own lanes the upper part. So the order, and with it every bit, is the same for any number of ranks.
//!
//! One rank with one lane adds in place and needs none of this.

use std::collections::VecDeque;
use std::sync::Arc;

use candle_core::Tensor;
use tandem_collective::{ExactSum, all_reduce_exact};
use tandem_kernels::reduce::{add_slice, block_sum_squares};
use tandem_kernels::slice::with_slice;

use super::reduced::Reduced;
use super::slice::Slicing;
use super::sums::Sums;
use super::{Placement, ZeroStage, bytes};
use crate::Result;
use crate::model::unit::{UnitBuffer, UnitLayout};

/// The gradient of a step under way.
#[derive(Debug)]
pub struct Gradients {
    placement: Placement,
    layouts: Vec<Arc<UnitLayout>>,
    slicing: Vec<Slicing>,
    mode: Mode,
    reduction: Reduction,
    /// Whether anything was added since the last step.
    pending: bool,
    /// Whether the stages of the pipeline have added up what they share.
    joined: bool,
}

/// What becomes of a gradient across data-parallel ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    /// It is added up over the ranks at every pass.
    Every,
    /// Each rank adds up its own passes only; what it then tells the others is the optimizer's business. Stage 0 only.
    Never,
}

#[derive(Debug)]
enum Mode {
    /// Kernels add to these buffers, each of which is there from the first time that anything is added to it until the step:
    /// at the beginning of a backward, when most activations are held, there is room for them where gradients will be.
    InPlace(Vec<Option<UnitBuffer>>),
    Reduced(Reduced),
}

impl Gradients {
    /// No gradient yet, for units of these layouts.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn new(placement: &Placement, layouts: &[Arc<UnitLayout>]) -> Result<Self> {
        let parallel = &placement.parallel;
        let ranks = if placement.stage == ZeroStage::Zero { 1 } else { parallel.data.size() };
        let slicing: Vec<Slicing> = layouts.iter().map(|layout| Slicing { len: layout.len(), ranks }).collect();
        let buffers = || {
            let zeros =
                layouts.iter().zip(&slicing).map(|(layout, cut)| UnitBuffer::zeros_padded(layout, cut.padded()));
            zeros.collect::<Result<Vec<_>>>()
        };
        let mode = if parallel.data_lanes == 1 {
            Mode::InPlace(vec![None; layouts.len()])
        } else {
            let keeps_whole = placement.stage == ZeroStage::One && !parallel.data.is_solo();
            let sums = slicing.iter().map(|slicing| Sums { total: vec![0.0; slicing.each()], ..Sums::default() });
            Mode::Reduced(Reduced {
                whole: if keeps_whole { Some(buffers()?) } else { None },
                open: vec![None; layouts.len()],
                room: Vec::new(),
                under_way: VecDeque::new(),
                under_way_bytes: 0,
                sums: sums.collect(),
            })
        };
        let (placement, layouts) = (placement.clone(), layouts.to_vec());
        Ok(Self { placement, layouts, slicing, mode, reduction: Reduction::Every, pending: false, joined: false })
    }

    /// What becomes of this gradient across ranks.
    pub fn reduction(&self) -> Reduction {
        self.reduction
    }

    /// Chooses what becomes of this gradient, before anything is added, on all ranks alike.
    pub(crate) fn set_reduction(&mut self, reduction: Reduction) {
        self.reduction = reduction;
    }

    /// The gradient by unit, where one rank adds it up in place; on many ranks it lies in slices.
    ///
    /// # Errors
    /// If the memory for the zeros of units that nothing was added to cannot be had.
    pub fn in_place(&self) -> Result<Option<Vec<UnitBuffer>>> {
        let Mode::InPlace(buffers) = &self.mode else { return Ok(None) };
        let unit =
            |(buffer, layout): (&Option<UnitBuffer>, _)| buffer.clone().map_or_else(|| UnitBuffer::zeros(layout), Ok);
        buffers.iter().zip(&self.layouts).map(unit).collect::<Result<_>>().map(Some)
    }

    /// Whether a gradient waits for a step.
    pub fn is_pending(&self) -> bool {
        self.pending
    }

    /// How this rank's slices are cut.
    pub(crate) fn slicing(&self, unit: usize) -> Slicing {
        self.slicing[unit]
    }

    /// Which slice is this rank's.
    pub(crate) fn rank(&self) -> usize {
        slice_rank(&self.placement)
    }

    /// Where the backward of a unit adds its gradient. All ranks open and close units in the same order.
    pub(crate) fn open(&mut self, unit: usize) -> Result<UnitBuffer> {
        self.pending = true;
        let reduced = match &mut self.mode {
            Mode::InPlace(buffers) => return opened(&mut buffers[unit], &self.layouts[unit], self.slicing[unit]),
            Mode::Reduced(reduced) => reduced,
        };
        if let Some(whole) = &reduced.whole {
            return Ok(whole[unit].clone());
        }
        if let Some(open) = &reduced.open[unit] {
            return Ok(open.clone());
        }
        let buffer = reduced.take_room(&self.layouts[unit], self.slicing[unit])?;
        reduced.open[unit] = Some(buffer.clone());
        Ok(buffer)
    }

    /// The gradient of a unit is complete for this pass.
    pub(crate) fn close(&mut self, unit: usize) -> Result<()> {
        let Mode::Reduced(reduced) = &mut self.mode else { return Ok(()) };
        if reduced.whole.is_some() || self.layouts[unit].is_empty() {
            return Ok(());
        }
        let limit = self.placement.reduce_bucket_bytes;
        reduced.close(unit, &self.placement, self.reduction)?;
        while reduced.under_way_bytes > limit && reduced.under_way.len() > 1 {
            reduced.absorb(&self.placement)?;
        }
        Ok(())
    }

    /// The pass of one lane is over.
    pub(crate) fn end_pass(&mut self) -> Result<()> {
        let Mode::Reduced(reduced) = &mut self.mode else { return Ok(()) };
        if let Some(whole) = reduced.whole.take() {
            // In the order of the units, one after the other on its way while the one before is added up.
            let mut lent = Vec::new();
            for (unit, buffer) in whole.iter().enumerate().filter(|(_, buffer)| !buffer.layout().is_empty()) {
                lent.push(reduced.start(unit, buffer.storage().clone(), &self.placement)?);
                while reduced.under_way.len() > 1 {
                    reduced.absorb(&self.placement)?;
                }
            }
            reduced.absorb_all(&self.placement)?;
            // Peers may still read what was lent; the next pass must not write over it.
            let data = &self.placement.parallel.data;
            data.world().barrier(data.tag("gradients added"))?;
            let is_free = || lent.iter().all(|lent| Arc::strong_count(lent) == 1);
            data.world().settle(data.tag("take back gradients"), &is_free)?;
            drop(lent);
            whole.iter().try_for_each(UnitBuffer::clear)?;
            reduced.whole = Some(whole);
            return Ok(());
        }
        reduced.absorb_all(&self.placement)
    }

    /// Bytes held between the passes of a step.
    pub fn size_bytes(&self) -> u64 {
        let elements: usize = match &self.mode {
            Mode::InPlace(_) => self.slicing.iter().map(Slicing::padded).sum(),
            Mode::Reduced(Reduced { whole, room, sums, .. }) => {
                let whole = whole.iter().flatten().map(|buffer| buffer.storage().elem_count());
                let room = room.iter().map(|room| room.buffer.storage().elem_count());
                whole.chain(room).chain(sums.iter().map(|sums| sums.total.len())).sum()
            }
        };
        4 * elements as u64
    }

    /// Adds up the ends of a pipeline, which its first and last stage both hold.
    pub(crate) fn join_stages(&mut self) -> Result<()> {
        let parallel = self.placement.parallel.clone();
        if self.layouts[0].is_empty() {
            return Ok(());
        }
        let pipeline = &parallel.pipeline;
        if std::mem::replace(&mut self.joined, true)
            || pipeline.is_solo()
            || !(parallel.is_first_stage() || parallel.is_last_stage())
        {
            return Ok(());
        }
        let other = if parallel.is_first_stage() { pipeline.size() - 1 } else { 0 };
        let tag = tandem_collective::Tag::new("ends of the pipeline", 0);
        let mut message = Vec::new();
        self.with_slice(0, |mine| bytes::append(mine, &mut message))?;
        let mut received = vec![0u8; message.len()];
        pipeline.world().send(tag, message, other)?;
        pipeline.world().receive(tag, &mut received, other)?;
        let mut terms = vec![0f32; received.len() / 4];
        bytes::fill(&mut terms, &received);
        match &mut self.mode {
            // The sum of two numbers does not depend on their order.
            Mode::InPlace(buffers) => {
                let mine = opened(&mut buffers[0], &self.layouts[0], self.slicing[0])?;
                tandem_kernels::slice::with_slice_mut(mine.flat(), |mine| add_slice(mine, &terms))??;
            }
            Mode::Reduced(reduced) => add_slice(&mut reduced.sums[0].total[..terms.len()], &terms)?,
        }
        Ok(())
    }

    /// Runs `read` on the elements of this rank's slice of the gradient of a unit.
    ///
    /// # Errors
    /// If the tensor library refuses.
    pub fn with_slice<R>(&self, unit: usize, read: impl FnOnce(&[f32]) -> R) -> Result<R> {
        let range = self.slicing[unit].range(self.rank());
        match &self.mode {
            Mode::InPlace(buffers) => match &buffers[unit] {
                Some(buffer) => {
                    let part: Tensor = buffer.flat().narrow(0, range.start, range.len())?;
                    Ok(with_slice(&part, read)?)
                }
                None => Ok(read(&vec![0.0; range.len()])),
            },
            Mode::Reduced(reduced) => Ok(read(&reduced.sums[unit].total[..range.len()])),
        }
    }

    /// Norm of the mean gradient over `denominator` terms: the root of the sum of squares over all units and ranks.
    ///
    /// Of gradients that are not added up over the ranks ([`Reduction::Never`]) nobody knows the sum. Their norm is what it
    /// would be if the gradients of no two ranks had anything in common, as with noise; if all are the same, the true norm
    /// is that times the root of the number of ranks.
    ///
    /// Squares are added in f64 over fixed blocks, and blocks exactly, so the bits do not depend on who holds what.
    ///
    /// # Errors
    /// If ranks have lost each other.
    pub fn norm(&self, denominator: f64) -> Result<f64> {
        let parallel = &self.placement.parallel;
        let mut sum = ExactSum::new();
        let is_local = self.reduction == Reduction::Never;
        let counts_slices = is_local || self.placement.stage != ZeroStage::Zero || parallel.at.data == 0;
        let mut blocks = Vec::new();
        for (unit, layout) in self.layouts.iter().enumerate().filter(|_| counts_slices) {
            // Both ends of a pipeline hold the ends; the first counts them.
            if unit == 0 && !parallel.is_first_stage() {
                continue;
            }
            let range = self.slicing[unit].range(self.rank());
            self.with_slice(unit, |slice| {
                for section in &layout.sections {
                    // What all tensor-parallel ranks hold is counted once.
                    let counted = section.piece.is_some() || parallel.at.tensor == 0;
                    let (start, end) = (section.start.max(range.start), (section.start + section.len).min(range.end));
                    if counted && start < end {
                        blocks.clear();
                        block_sum_squares(&slice[start - range.start..end - range.start], &mut blocks);
                        blocks.iter().for_each(|&block| sum.add(block));
                    }
                }
            })?;
        }
        let mut sums = [sum];
        if !parallel.world.is_solo() {
            all_reduce_exact(&**parallel.world.world(), parallel.world.tag("gradient norm"), &mut sums)?;
        }
        Ok(sums[0].value().sqrt() / denominator)
    }

    /// Forgets the gradient.
    ///
    /// # Errors
    /// If the tensor library refuses.
    pub fn clear(&mut self) -> Result<()> {
        (self.pending, self.joined) = (false, false);
        match &mut self.mode {
            Mode::InPlace(buffers) => {
                buffers.fill(None);
                Ok(())
            }
            Mode::Reduced(reduced) => {
                for sums in &mut reduced.sums {
                    sums.tree.clear();
                    sums.filled = false;
                }
                Ok(())
            }
        }
    }
}

/// The buffer of a unit, made of zeros if it is not there.
fn opened(buffer: &mut Option<UnitBuffer>, layout: &Arc<UnitLayout>, slicing: Slicing) -> Result<UnitBuffer> {
    match buffer {
        Some(buffer) => Ok(buffer.clone()),
        None => Ok(buffer.insert(UnitBuffer::zeros_padded(layout, slicing.padded())?).clone()),
    }
}

/// Which slice of the gradient is this rank's.
fn slice_rank(placement: &Placement) -> usize {
    if placement.stage == ZeroStage::Zero { 0 } else { placement.parallel.data.rank() }
}
