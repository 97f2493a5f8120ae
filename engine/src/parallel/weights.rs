//! Weights of units: whole on every rank, or in slices that are brought together for as long as they are needed.

use std::collections::VecDeque;
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Tensor};
use half::bf16;
use tandem_collective::{Shared, Work};
use tandem_kernels::slice::{with_slice, with_slice_mut, with_slice_mut_of};

use super::filed::{Filed, Master};
use super::slice::{SliceBuffer, Slicing};
use super::whole::{Packing, Whole};
use super::{Parallel, Placement, ZeroStage, words};
use crate::model::unit::{UnitBuffer, UnitLayout};
use crate::precision::{Precision, WeightFormat};
use crate::{Error, Result};

/// The weights of a model's units, in order. Clones share them.
#[derive(Clone, Debug)]
pub(crate) enum Weights {
    /// Every unit whole.
    Whole(Arc<Whole>),
    /// A slice of every unit.
    Sliced(Arc<Sliced>),
}

/// Weights in slices.
#[derive(Debug)]
pub(crate) struct Sliced {
    parallel: Arc<Parallel>,
    precision: Precision,
    layouts: Vec<Arc<UnitLayout>>,
    prefetch_units: usize,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    slices: Vec<Arc<SliceBuffer>>,
    /// Gathers that were started ahead of their use, oldest first.
    in_flight: VecDeque<(usize, Work)>,
    /// Room for units that is not in use.
    spare: Vec<Tensor>,
    /// Units that are never let go.
    kept: Vec<Kept>,
}

/// Whether a unit stays together.
#[derive(Debug)]
enum Kept {
    No,
    /// It does, but has changed since it was gathered.
    Stale,
    Fresh(Tensor),
}

/// A unit's weights for as long as this lives.
#[derive(Debug)]
pub(crate) struct Fetched {
    buffer: UnitBuffer,
    /// Where its room goes back to.
    home: Option<(Arc<Sliced>, Tensor)>,
}

impl Deref for Fetched {
    type Target = UnitBuffer;
    fn deref(&self) -> &UnitBuffer {
        &self.buffer
    }
}

impl Drop for Fetched {
    fn drop(&mut self) {
        if let Some((home, room)) = self.home.take() {
            home.lock().spare.push(room);
        }
    }
}

/// How the slices of a unit are cut under a placement's weights.
pub(crate) fn slicing(layout: &UnitLayout, placement: &Placement) -> Slicing {
    Slicing { len: layout.len(), ranks: placement.parallel.data.size() }
}

impl Weights {
    /// Puts units in place: `unit` is called once for each layout, in order, and its result is let go of at once.
    pub(crate) fn place(
        placement: &Placement,
        layouts: &[Arc<UnitLayout>],
        mut unit: impl FnMut(&Arc<UnitLayout>) -> Result<UnitBuffer>,
    ) -> Result<Self> {
        let data = &placement.parallel.data;
        let format = if placement.is_frozen { placement.weights } else { WeightFormat::Precision };
        format.check(placement.precision)?;
        let is_whole = placement.stage < ZeroStage::Three || data.is_solo();
        if format == WeightFormat::Int8 && !is_whole {
            let problem =
                "weights of 8 bits are kept whole; take zero_stage 0, or keep slices in the precision of the run";
            return Err(Error::Int8(problem.into()));
        }
        if is_whole {
            let is_narrow = placement.is_frozen && placement.precision != Precision::F32;
            let whole = layouts.iter().map(|layout| match (format, is_narrow) {
                (WeightFormat::Int8, _) => unit(layout)?.quantised(&placement.parallel.tensor),
                (WeightFormat::Precision, true) => unit(layout)?.narrowed(),
                (WeightFormat::Precision, false) => padded(unit(layout)?, slicing(layout, placement)),
            });
            let files = placement.weights_dir().filter(|_| placement.is_frozen && format != WeightFormat::Int8);
            let masters = whole.map(|unit| match files {
                Some(dir) => Ok(Master::File(Filed::of(&unit?, dir)?)),
                None => Ok(Master::Memory(unit?)),
            });
            return Ok(Weights::Whole(Arc::new(Whole::of(masters.collect::<Result<_>>()?, placement.precision))));
        }
        let dir = placement.weights_dir();
        let mut slices = Vec::with_capacity(layouts.len());
        for layout in layouts {
            let buffer = unit(layout)?;
            let slicing = slicing(layout, placement);
            let range = slicing.range(data.rank());
            let mut values = vec![0f32; slicing.each()];
            with_slice(buffer.flat(), |flat| values[..range.len()].copy_from_slice(&flat[range]))?;
            slices.push(Arc::new(SliceBuffer::of(values, dir)?));
        }
        let kept = layouts.iter().map(|layout| match layout.len() <= placement.persistence_threshold {
            true => Kept::Stale,
            false => Kept::No,
        });
        let state = State { slices, in_flight: VecDeque::new(), spare: Vec::new(), kept: kept.collect() };
        Ok(Weights::Sliced(Arc::new(Sliced {
            parallel: placement.parallel.clone(),
            precision: placement.precision,
            layouts: layouts.to_vec(),
            prefetch_units: placement.prefetch_units,
            state: Mutex::new(state),
        })))
    }

    /// Units of one rank alone that compute in `precision`.
    pub(crate) fn solo(units: Vec<UnitBuffer>, precision: Precision) -> Self {
        Weights::Whole(Arc::new(Whole::new(units, precision)))
    }

    /// The format that passes compute in.
    pub(crate) fn precision(&self) -> Precision {
        match self {
            Weights::Whole(whole) => whole.precision(),
            Weights::Sliced(sliced) => sliced.precision,
        }
    }

    /// What linear maps are kept in.
    pub(crate) fn format(&self) -> WeightFormat {
        match self {
            Weights::Whole(whole) if whole.is_int8() => WeightFormat::Int8,
            Weights::Whole(_) | Weights::Sliced(_) => WeightFormat::Precision,
        }
    }

    /// Chooses whether the matrices of whole units are packed for products with few rows from now on.
    pub(crate) fn set_packing(&self, packing: Packing) {
        if let Weights::Whole(whole) = self {
            whole.set_packing(packing);
        }
    }

    /// The weights of unit `index` for a pass over `tokens` tokens. In slices, all data-parallel ranks call this together, and
    /// the gathers of the units in `upcoming` may be started ahead.
    pub(crate) fn fetch(
        &self,
        index: usize,
        tokens: usize,
        upcoming: impl IntoIterator<Item = usize>,
    ) -> Result<Fetched> {
        match self {
            Weights::Whole(whole) => Ok(Fetched { buffer: whole.computed(index, tokens)?, home: None }),
            Weights::Sliced(sliced) => sliced.fetch(index, upcoming),
        }
    }

    /// The master weights of unit `index` in f32: the storage itself where they are whole and trained. In slices, all
    /// data-parallel ranks call this together.
    pub(crate) fn fetch_master(&self, index: usize) -> Result<UnitBuffer> {
        match self {
            Weights::Whole(whole) => whole.master(index)?.widened(),
            Weights::Sliced(sliced) => sliced.gather_master(index),
        }
    }

    /// Whether every rank holds slices only.
    pub(crate) fn is_sliced(&self) -> bool {
        matches!(self, Weights::Sliced(_))
    }

    /// The layouts of the units.
    pub(crate) fn layouts(&self) -> Vec<Arc<UnitLayout>> {
        match self {
            Weights::Whole(whole) => whole.layouts().to_vec(),
            Weights::Sliced(sliced) => sliced.layouts.clone(),
        }
    }

    /// Runs `change` on the elements of this rank's slice of unit `index`, without its padding; whole weights have a slice
    /// as `slicing` cuts them.
    pub(crate) fn change<R>(
        &self,
        index: usize,
        slicing: Slicing,
        rank: usize,
        change: impl FnOnce(&mut [f32]) -> R,
    ) -> Result<R> {
        let range = slicing.range(rank);
        match self {
            Weights::Whole(whole) => {
                whole.changed(index);
                let part = whole.master(index)?.flat().narrow(0, range.start, range.len())?;
                Ok(with_slice_mut(&part, change)?)
            }
            Weights::Sliced(sliced) => {
                let mut state = sliced.lock();
                if let Kept::Fresh(_) = state.kept[index] {
                    state.kept[index] = Kept::Stale;
                }
                // A gather that was started ahead and never fetched would bring what the weights were.
                if state.in_flight.iter().any(|(unit, _)| *unit == index) {
                    return Err(Error::WeightsInUse);
                }
                // Gathers before this step have lent it to peers.
                let (data, lent) = (&sliced.parallel.data, &state.slices[index]);
                data.world().settle(data.tag("take back weights"), &|| Arc::strong_count(lent) == 1)?;
                let slice = Arc::get_mut(&mut state.slices[index]).ok_or(Error::WeightsInUse)?;
                let result = change(&mut slice[..range.len()]);
                slice.let_go();
                Ok(result)
            }
        }
    }

    /// Runs `read` on the elements of this rank's slice of unit `index`, as [`Self::change`].
    pub(crate) fn read<R>(
        &self,
        index: usize,
        slicing: Slicing,
        rank: usize,
        read: impl FnOnce(&[f32]) -> R,
    ) -> Result<R> {
        let range = slicing.range(rank);
        match self {
            Weights::Whole(whole) => {
                let part = whole.master(index)?.flat().narrow(0, range.start, range.len())?;
                Ok(with_slice(&part, read)?)
            }
            Weights::Sliced(sliced) => Ok(sliced.with_slice(index, |slice| read(&slice[..range.len()]))),
        }
    }

    /// After each rank has changed its slice of whole weights, one of `slices`: gives every rank all of them.
    pub(crate) fn spread(&self, parallel: &Parallel, slices: usize) -> Result<()> {
        let (Weights::Whole(whole), data) = (self, &parallel.data) else { return Ok(()) };
        if slices == 1 {
            return Ok(());
        }
        for (index, _) in whole.layouts().iter().enumerate().filter(|(_, layout)| !layout.is_empty()) {
            whole.changed(index);
            let unit = whole.master(index)?;
            let each = unit.storage().elem_count() / data.size();
            let mine = with_slice(&unit.storage().narrow(0, data.rank() * each, each)?, <[f32]>::to_vec)?;
            with_slice_mut(unit.storage(), |all| data.world().all_gather_f32(data.tag("spread weights"), &mine, all))??;
        }
        Ok(())
    }
}

/// The unit in a storage that slices of equal length fit into.
fn padded(unit: UnitBuffer, slicing: Slicing) -> Result<UnitBuffer> {
    if slicing.padded() == slicing.len {
        return Ok(unit);
    }
    let room = UnitBuffer::zeros_padded(unit.layout(), slicing.padded())?;
    with_slice_mut(room.flat(), |to| with_slice(unit.flat(), |from| to.copy_from_slice(from)))??;
    Ok(room)
}

impl Sliced {
    /// A deep copy.
    pub(crate) fn duplicate(&self) -> Result<Self> {
        let state = self.lock();
        let copy = |slice: &Arc<SliceBuffer>| {
            let copy = Arc::new(SliceBuffer::Memory(slice.to_vec()));
            slice.let_go();
            copy
        };
        let kept = state.kept.iter().map(|kept| if matches!(kept, Kept::No) { Kept::No } else { Kept::Stale });
        let state = State {
            slices: state.slices.iter().map(copy).collect(),
            in_flight: VecDeque::new(),
            spare: Vec::new(),
            kept: kept.collect(),
        };
        Ok(Self {
            parallel: self.parallel.clone(),
            precision: self.precision,
            layouts: self.layouts.clone(),
            prefetch_units: self.prefetch_units,
            state: Mutex::new(state),
        })
    }

    /// Runs `read` on this rank's slice of a unit, padding included.
    pub(crate) fn with_slice<R>(&self, index: usize, read: impl FnOnce(&[f32]) -> R) -> R {
        let slice = self.lock().slices[index].clone();
        let result = read(&slice);
        slice.let_go();
        result
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // What is behind the lock is as good after a panic as before: slices change only in `Weights::change`.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fetch(self: &Arc<Self>, index: usize, upcoming: impl IntoIterator<Item = usize>) -> Result<Fetched> {
        let layout = &self.layouts[index];
        let mut state = self.lock();
        let work = match &state.kept[index] {
            Kept::Fresh(flat) => {
                return Ok(Fetched { buffer: UnitBuffer::on(layout, flat.clone())?, home: None });
            }
            _ if layout.is_empty() => {
                let flat = Tensor::zeros(0, self.precision.dtype(), &Device::Cpu)?;
                return Ok(Fetched { buffer: UnitBuffer::on(layout, flat)?, home: None });
            }
            _ => match state.in_flight.iter().position(|(unit, _)| *unit == index) {
                Some(place) => state.in_flight.remove(place).map(|(_, work)| work),
                None => None,
            },
        };
        let work = match work {
            Some(work) => work,
            None => self.start(&state, index)?,
        };
        for next in upcoming.into_iter().take(self.prefetch_units) {
            let known = next == index || state.in_flight.iter().any(|(unit, _)| *unit == next);
            if !known && !self.layouts[next].is_empty() && !matches!(state.kept[next], Kept::Fresh(_)) {
                let ahead = self.start(&state, next)?;
                state.in_flight.push_back((next, ahead));
            }
        }
        let padded = state.slices[index].len() * self.parallel.data.size();
        let room = match state.spare.iter().position(|room| room.elem_count() == padded) {
            Some(place) => state.spare.swap_remove(place),
            None => Tensor::zeros(padded, self.precision.dtype(), &Device::Cpu)?,
        };
        let is_kept = matches!(state.kept[index], Kept::Stale);
        if is_kept {
            state.kept[index] = Kept::Fresh(room.clone());
        }
        drop(state);
        match self.precision {
            Precision::F32 => with_slice_mut(&room, |all| work.wait_into(all))??,
            Precision::Bf16 => with_slice_mut_of(&room, |all: &mut [bf16]| words::wait_into(work, all))??,
        }
        // Where peers still read it, they bring back what they miss.
        self.lock().slices[index].let_go();
        let buffer = UnitBuffer::on(layout, room.clone())?;
        Ok(Fetched { buffer, home: (!is_kept).then(|| (self.clone(), room)) })
    }

    fn start(&self, state: &State, index: usize) -> Result<Work> {
        let data = &self.parallel.data;
        let slice: Shared = match self.precision {
            Precision::F32 => state.slices[index].clone(),
            Precision::Bf16 => Arc::new(words::narrowed(&state.slices[index])?),
        };
        Ok(data.world().start_all_gather_f32(data.tag("gather weights"), slice)?)
    }

    /// The master weights of a unit, brought together.
    fn gather_master(&self, index: usize) -> Result<UnitBuffer> {
        let (layout, data) = (&self.layouts[index], &self.parallel.data);
        let slice = self.lock().slices[index].clone();
        let room = Tensor::zeros(slice.len() * data.size(), DType::F32, &Device::Cpu)?;
        if !layout.is_empty() {
            let gather = |all: &mut [f32]| data.world().all_gather_f32(data.tag("gather master weights"), &slice, all);
            with_slice_mut(&room, gather)??;
            slice.let_go();
        }
        UnitBuffer::on(layout, room)
    }
}

#[cfg(test)]
pub(super) mod tests;
