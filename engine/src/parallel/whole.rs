//! Whole weights of units, and what passes compute with where that is not the weights themselves.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::Result;
use crate::model::unit::UnitBuffer;
use crate::precision::Precision;

/// The weights of units that this rank has whole.
#[derive(Debug)]
pub(crate) struct Whole {
    /// What is trained, in f32; of a model that is not trained, the weights in the format that it computes in.
    masters: Vec<UnitBuffer>,
    precision: Precision,
    derived: Vec<Mutex<Derived>>,
}

/// What is made from the master weights of a unit, when it is first needed after they have changed.
#[derive(Debug, Default)]
struct Derived {
    /// The weights in the format that passes compute in, if the master weights are in another one.
    copy: Option<UnitBuffer>,
    /// Whether the copy is of the weights as they are now.
    is_fresh: bool,
    /// Whether matrices are to be kept packed for products with few rows.
    wants_packed: bool,
    /// The weights with their packed matrices, as they are now.
    packed: Option<UnitBuffer>,
}

impl Whole {
    /// Units that compute in `precision`.
    pub(crate) fn new(masters: Vec<UnitBuffer>, precision: Precision) -> Self {
        let derived = masters.iter().map(|_| Mutex::default()).collect();
        Self { masters, precision, derived }
    }

    /// The format that passes compute in.
    pub(crate) fn precision(&self) -> Precision {
        self.precision
    }

    /// The weights that are trained.
    pub(crate) fn masters(&self) -> &[UnitBuffer] {
        &self.masters
    }

    /// The weights of a unit as passes compute with them.
    pub(crate) fn computed(&self, index: usize) -> Result<UnitBuffer> {
        let mut derived = self.derived(index);
        if let Some(packed) = &derived.packed {
            return Ok(packed.clone());
        }
        let master = &self.masters[index];
        let unit = if master.dtype() == self.precision.dtype() {
            master.clone()
        } else {
            match (&derived.copy, derived.is_fresh) {
                (Some(copy), true) => copy.clone(),
                (Some(copy), false) => {
                    copy.narrow_from(master)?;
                    copy.clone()
                }
                (None, _) => derived.copy.insert(master.narrowed()?).clone(),
            }
        };
        derived.is_fresh = true;
        if derived.wants_packed {
            return Ok(derived.packed.insert(unit.packed()?).clone());
        }
        Ok(unit)
    }

    /// Says that the master weights of a unit have changed.
    pub(crate) fn changed(&self, index: usize) {
        let mut derived = self.derived(index);
        derived.is_fresh = false;
        derived.packed = None;
    }

    /// Keeps matrices packed from now on, or no longer.
    pub(crate) fn keep_packed(&self, wants_packed: bool) {
        for index in 0..self.masters.len() {
            let mut derived = self.derived(index);
            derived.wants_packed = wants_packed;
            derived.packed = None;
        }
    }

    /// A deep copy of the master weights.
    pub(crate) fn duplicate(&self) -> Result<Self> {
        let masters = self.masters.iter().map(UnitBuffer::duplicate).collect::<Result<_>>()?;
        Ok(Self::new(masters, self.precision))
    }

    fn derived(&self, index: usize) -> MutexGuard<'_, Derived> {
        // What a panic leaves is either not fresh or whole.
        self.derived[index].lock().unwrap_or_else(PoisonError::into_inner)
    }
}
