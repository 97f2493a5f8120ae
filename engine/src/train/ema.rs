//! Exponential moving average of a model's weights.

use tandem_kernels::optimizer::ema_update;

use crate::Result;
use crate::model::Model;
use crate::model::unit::UnitBuffer;

/// A slowly following copy of a model: `average ← decay · average + (1 − decay) · weights` after each applied step.
#[derive(Clone, Debug)]
pub struct Ema {
    decay: f64,
    units: Vec<UnitBuffer>,
}

impl Ema {
    /// Starts at the model's weights.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn new(model: &Model, decay: f64) -> Result<Self> {
        let units = model.units().iter().map(UnitBuffer::duplicate).collect::<Result<_>>()?;
        Ok(Self { decay, units })
    }

    /// An average as it was saved.
    pub fn from_parts(decay: f64, units: Vec<UnitBuffer>) -> Self {
        Self { decay, units }
    }

    /// Follows the model by one step. Call it only after a step that was applied.
    ///
    /// # Errors
    /// If the tensor library refuses.
    pub fn update(&mut self, model: &Model) -> Result<()> {
        for (average, unit) in self.units.iter().zip(model.units()) {
            ema_update(average.flat(), unit.flat(), self.decay)?;
        }
        Ok(())
    }

    /// The averaged weights by unit.
    pub fn units(&self) -> &[UnitBuffer] {
        &self.units
    }
}
