//! Exponential moving average of a model's weights.

use tandem_kernels::optimizer::ema_slice;

use super::optimizer::{slice_rank, slicing};
use crate::Result;
use crate::model::Model;
use crate::parallel::{Placement, SliceBuffer};

/// A slowly following copy of a model: `average ← decay · average + (1 − decay) · weights` after each applied step. A rank keeps
/// its slices.
#[derive(Debug)]
pub struct Ema {
    decay: f64,
    placement: Placement,
    slices: Vec<SliceBuffer>,
}

impl Ema {
    /// Starts at the model's weights; slices are cut as those of an optimizer in the same place.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn new(model: &Model, decay: f64, placement: &Placement) -> Result<Self> {
        let rank = slice_rank(placement);
        let copy = |(index, layout): (usize, &std::sync::Arc<crate::model::unit::UnitLayout>)| {
            let slicing = slicing(layout.len(), placement);
            let mut slice = SliceBuffer::zeros(slicing.each(), None)?;
            model.trained().read(index, slicing, rank, |weights| slice[..weights.len()].copy_from_slice(weights))?;
            Ok(slice)
        };
        let slices = model.trained_layouts().iter().enumerate().map(copy).collect::<Result<_>>()?;
        Ok(Self { decay, placement: placement.clone(), slices })
    }

    /// Follows the model by one step. Call it only after a step that was applied.
    ///
    /// # Errors
    /// If the tensor library refuses.
    pub fn update(&mut self, model: &Model) -> Result<()> {
        let rank = slice_rank(&self.placement);
        for (index, layout) in model.trained_layouts().iter().enumerate() {
            let average = &mut self.slices[index];
            model.trained().read(index, slicing(layout.len(), &self.placement), rank, |weights| {
                ema_slice(&mut average[..weights.len()], weights, self.decay)
            })??;
        }
        Ok(())
    }

    /// This rank's slices of the averaged weights, by unit.
    pub fn slices(&self) -> &[SliceBuffer] {
        &self.slices
    }

    pub(crate) fn slices_mut(&mut self) -> &mut [SliceBuffer] {
        &mut self.slices
    }

    pub(crate) fn placement(&self) -> &Placement {
        &self.placement
    }

    /// The model that `model`, which the average follows, has become on average. All ranks call it together.
    ///
    /// # Errors
    /// If the memory cannot be had or ranks have lost each other.
    pub fn model(&self, model: &Model) -> Result<Model> {
        let copy = model.duplicate()?;
        let (rank, layouts) = (slice_rank(&self.placement), model.trained_layouts());
        for (index, layout) in layouts.iter().enumerate() {
            copy.trained().change(index, slicing(layout.len(), &self.placement), rank, |weights| {
                weights.copy_from_slice(&self.slices[index][..weights.len()]);
            })?;
        }
        let ranks = slicing(0, &self.placement).ranks;
        copy.trained().spread(model.parallel(), ranks)?;
        Ok(copy)
    }
}
