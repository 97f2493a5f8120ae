//! Whole weights of units, and what passes compute with where that is not the weights themselves.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::filed::Master;
use crate::Result;
use crate::model::unit::{UnitBuffer, UnitId, UnitLayout};
use crate::precision::Precision;

/// Tokens from which on a pass makes the bf16 copy of a unit whenever it comes to it, and lets it go. What such a pass keeps
/// for its backward is more than all copies together, and computing takes a hundred times as long as copying; those of
/// smaller passes are kept until the weights change or a large pass comes.
pub const LARGE_PASS: usize = 1024;

/// The weights of units that this rank has whole.
#[derive(Debug)]
pub(crate) struct Whole {
    layouts: Vec<Arc<UnitLayout>>,
    precision: Precision,
    units: Vec<Mutex<Held>>,
}

/// Whether matrices are packed for products with few rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Packing {
    /// They are not.
    #[default]
    None,
    /// They are, beside the plain ones.
    Beside,
    /// They are, and bf16 matrices of blocks are held in no other way.
    Instead,
}

/// What is held of a unit: its weights, and what is made from them when it is first needed after they have changed.
#[derive(Debug)]
struct Held {
    /// What is trained, in f32; of a model that is not trained, the weights in the format that it computes in.
    master: Master,
    /// The weights as they are now in the format that passes compute in, if the master weights are in another one.
    copy: Option<UnitBuffer>,
    packing: Packing,
    /// The weights with their packed matrices, as they are now.
    packed: Option<UnitBuffer>,
}

impl Whole {
    /// Units that compute in `precision`.
    pub(crate) fn new(masters: Vec<UnitBuffer>, precision: Precision) -> Self {
        Self::of(masters.into_iter().map(Master::Memory).collect(), precision)
    }

    /// As [`Self::new`], of units wherever they are.
    pub(super) fn of(masters: Vec<Master>, precision: Precision) -> Self {
        let layouts = masters.iter().map(|unit| unit.layout().clone()).collect();
        let held = |master| Held { master, copy: None, packing: Packing::None, packed: None };
        Self { layouts, precision, units: masters.into_iter().map(|master| Mutex::new(held(master))).collect() }
    }

    /// The format that passes compute in.
    pub(crate) fn precision(&self) -> Precision {
        self.precision
    }

    /// The layouts of the units.
    pub(crate) fn layouts(&self) -> &[Arc<UnitLayout>] {
        &self.layouts
    }

    /// Whether matrices of blocks are kept in 8 bits.
    pub(crate) fn is_int8(&self) -> bool {
        let is_int8 = |master: &Master| matches!(master, Master::Memory(unit) if unit.is_int8());
        (0..self.units.len()).any(|index| is_int8(&self.held(index).master))
    }

    /// The weights of a unit that are trained; of a model that is not trained, those in the format that it computes in.
    pub(crate) fn master(&self, index: usize) -> Result<UnitBuffer> {
        self.held(index).master.read()?.plain()
    }

    /// Room for the weights of a unit: where they lie, or, if they are packed, new room instead of them.
    pub(crate) fn room(&self, index: usize) -> Result<UnitBuffer> {
        let mut held = self.held(index);
        held.packed = None;
        if !matches!(&held.master, Master::Memory(unit) if unit.is_plain()) {
            let (layout, dtype) = (held.master.layout().clone(), held.master.dtype());
            // The packed ones go before the new room comes.
            held.master = Master::Memory(UnitBuffer::zeros_of(&Arc::new(layout.emptied()), dtype)?);
            held.master = Master::Memory(UnitBuffer::zeros_of(&layout, dtype)?);
        }
        held.master.read()
    }

    /// All units, each as [`Self::master`] and let go of here if nobody else has them.
    pub(crate) fn into_masters(self: Arc<Self>) -> impl Iterator<Item = Result<UnitBuffer>> {
        let count = self.units.len();
        let (mut own, shared) = match Arc::try_unwrap(self) {
            Ok(own) => (own.units, None),
            Err(shared) => (Vec::new(), Some(shared)),
        };
        own.reverse();
        (0..count).map(move |index| match (own.pop(), &shared) {
            (Some(unit), _) => unit.into_inner().unwrap_or_else(PoisonError::into_inner).master.read()?.plain(),
            (None, Some(shared)) => shared.master(index),
            (None, None) => unreachable!("a unit for each index"),
        })
    }

    /// The weights of a unit as a pass over `tokens` tokens computes with them.
    pub(crate) fn computed(&self, index: usize, tokens: usize) -> Result<UnitBuffer> {
        let mut held = self.held(index);
        if let Some(packed) = &held.packed {
            return Ok(packed.clone());
        }
        let is_block = held.master.layout().id != UnitId::Ends;
        let instead = is_block && held.packing == Packing::Instead && self.precision == Precision::Bf16;
        let is_master = held.master.dtype() == self.precision.dtype();
        let unit = if is_master {
            held.master.read()?
        } else {
            // What is packed holds the others too.
            let keeps = held.packing == Packing::None && tokens < LARGE_PASS;
            held.narrowed(keeps)?
        };
        match held.packing {
            Packing::None => Ok(unit),
            _ if !unit.is_plain() => Ok(unit),
            _ if instead && is_master && matches!(held.master, Master::Memory(_)) => {
                let packed = unit.packed_instead()?;
                held.master = Master::Memory(packed.clone());
                Ok(packed)
            }
            _ => {
                let packed = if instead { unit.packed_instead()? } else { unit.packed()? };
                Ok(held.packed.insert(packed).clone())
            }
        }
    }

    /// Says that the master weights of a unit have changed.
    pub(crate) fn changed(&self, index: usize) {
        let mut held = self.held(index);
        held.copy = None;
        held.packed = None;
    }

    /// Chooses whether matrices are packed from now on.
    pub(crate) fn set_packing(&self, packing: Packing) {
        for index in 0..self.units.len() {
            let mut held = self.held(index);
            held.packing = packing;
            held.packed = None;
        }
    }

    /// A deep copy of the master weights.
    pub(crate) fn duplicate(&self) -> Result<Self> {
        let masters = (0..self.units.len()).map(|index| self.master(index)?.duplicate()).collect::<Result<_>>()?;
        Ok(Self::new(masters, self.precision))
    }

    fn held(&self, index: usize) -> MutexGuard<'_, Held> {
        // What a panic leaves is either not there or whole.
        self.units[index].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    /// The master weights in bf16: from a copy if there is one, which is kept or made only if `keeps`.
    fn narrowed(&mut self, keeps: bool) -> Result<UnitBuffer> {
        let copy = self.copy.take().map_or_else(|| self.master.read()?.narrowed(), Ok)?;
        self.copy = keeps.then(|| copy.clone());
        Ok(copy)
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::parallel::weights::tests::layouts;

    /// What a pass over `tokens` tokens computes with, and whether a copy stays.
    fn computed(whole: &Whole, index: usize, tokens: usize) -> (Vec<bf16>, bool) {
        let unit = whole.computed(index, tokens).unwrap();
        (unit.flat().to_vec1().unwrap(), whole.held(index).copy.is_some())
    }

    #[test]
    fn a_copy_stays_until_the_weights_change_or_a_large_pass_comes() {
        let units: Vec<_> = layouts().iter().map(|layout| UnitBuffer::initial(layout, 5).unwrap()).collect();
        let whole = Whole::new(units, Precision::Bf16);
        for index in 0..whole.layouts().len() {
            let first = computed(&whole, index, LARGE_PASS);
            assert!(!first.1, "the ends as well as a block");
            assert_eq!(computed(&whole, index, LARGE_PASS - 1), (first.0.clone(), true));
            assert_eq!(computed(&whole, index, LARGE_PASS), (first.0.clone(), false));
            assert!(computed(&whole, index, 1).1);
            let master = whole.master(index).unwrap();
            master.clear().unwrap();
            whole.changed(index);
            assert!(whole.held(index).copy.is_none());
            let zeros = vec![bf16::ZERO; first.0.len()];
            assert_ne!(first.0, zeros);
            assert_eq!(computed(&whole, index, 1), (zeros, true));
        }
        // What is packed is all that is there.
        whole.set_packing(Packing::Beside);
        whole.changed(1);
        assert!(!computed(&whole, 1, 1).1 && whole.held(1).packed.is_some());
    }
}
