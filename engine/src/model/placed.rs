//! Models on several ranks: taking a place, and coming together again.

use std::ops::Range;
use std::sync::Arc;

use tandem_kernels::slice::with_slice;

use super::Model;
use super::spec::ModelSpec;
use super::unit::{Content, Cut, Head, UnitBuffer, UnitId, UnitLayout, from_whole, to_whole};
use crate::parallel::{Distributed, Holding, Parallel, Placement, Weights, blocks_of_stage, layouts_of};
use crate::precision::{Precision, WeightFormat};
use crate::{Error, Result};

impl Model {
    /// Takes this rank's part of a model that it has whole, without adapters. Every unit is let go of as soon as its part is
    /// taken.
    ///
    /// # Errors
    /// If the model cannot be cut so, or the memory cannot be had.
    pub fn place(self, placement: &Placement) -> Result<Self> {
        if self.adapters.is_some() {
            return Err(Error::Lora("the model has adapters, which take their places after it".into()));
        }
        let (spec, head) = (self.spec.clone(), self.head);
        let mut units: Vec<Option<UnitBuffer>> = self.units()?.into_iter().map(Some).collect();
        drop(self);
        Self::placed(spec, head, placement, |index| {
            units[index].take().ok_or(Error::UnitCount { expected: index + 1, got: index })
        })
    }

    /// This rank's part of a model, each of whose units `whole` brings in the whole layout when it is its turn.
    ///
    /// # Errors
    /// If the model cannot be cut so, or `whole` fails.
    pub fn placed(
        spec: ModelSpec,
        head: Head,
        placement: &Placement,
        mut whole: impl FnMut(usize) -> Result<UnitBuffer>,
    ) -> Result<Self> {
        let parallel = &placement.parallel;
        let cut = parallel.cut()?;
        cut.check(&spec)?;
        if parallel.mesh.pipeline > spec.layers {
            return Err(Error::Mesh(format!(
                "{} blocks cannot be cut into {} pipeline stages; lower parallel.pipeline",
                spec.layers, parallel.mesh.pipeline
            )));
        }
        let layouts = layouts_of(&spec, &head.into(), &parallel.mesh, parallel.at.pipeline, &cut);
        let weights = Weights::place(placement, &layouts, |layout| {
            if layout.is_empty() {
                return UnitBuffer::zeros(layout);
            }
            from_whole(&spec, head, &whole(layout.id.index())?, &cut)
        })?;
        let blocks = blocks_of_stage(&spec, &parallel.mesh, parallel.at.pipeline);
        Self::assemble(spec, head, weights, cut, blocks, parallel.clone(), parallel.tensor.clone())
    }

    /// Unit `index` in the whole layout, its adapters merged, on rank 0 of the world; `None` on all others. All ranks call it
    /// together.
    ///
    /// # Errors
    /// If ranks have lost each other.
    pub fn whole_unit(&self, index: usize) -> Result<Option<UnitBuffer>> {
        let unit = self.whole_of(&self.weights, &Content::Weights(self.head), index)?;
        let Some(adapters) = &self.adapters else { return Ok(unit) };
        let whole = self.whole_of(&adapters.weights, &self.trained_content(), index)?;
        let (Some(unit), Some(whole)) = (unit, whole) else { return Ok(None) };
        // What came in one piece may be the base itself.
        let merged = unit.duplicate()?;
        adapters.merge(&self.spec, &merged, &whole)?;
        Ok(Some(merged))
    }

    /// What is trained of unit `index`, adapters if there are any, in the whole layout on rank 0 of the world; `None` on all
    /// others. All ranks call it together.
    ///
    /// # Errors
    /// If ranks have lost each other.
    pub fn whole_trained_unit(&self, index: usize) -> Result<Option<UnitBuffer>> {
        self.whole_of(self.trained(), &self.trained_content(), index)
    }

    fn whole_of(&self, weights: &Weights, content: &Content, index: usize) -> Result<Option<UnitBuffer>> {
        if self.parallel.world.is_solo() {
            return Ok(Some(to_whole(&self.spec, content, &weights.fetch_master(index)?)?));
        }
        let read = |unit: usize, back: &mut dyn FnMut(&[f32])| weights.with_held(unit, back);
        self.distributed(weights, content, &read).whole_unit(index)
    }

    fn distributed<'a>(
        &'a self,
        weights: &Weights,
        content: &'a Content,
        read: &'a crate::parallel::ReadUnit<'a>,
    ) -> Distributed<'a> {
        Distributed { spec: &self.spec, content, parallel: &self.parallel, sliced: weights.is_sliced(), read }
    }

    /// The model laid out for generation: whole units, cut for the ranks that generate together, adapters merged. Returns it
    /// with the bytes that came from other ranks. `room` is the copy made at an earlier switch, if it was kept; `portion` units are brought
    /// at once, and the linear maps of blocks are kept in `format`.
    ///
    /// # Errors
    /// If ranks have lost each other, the memory cannot be had or the weights cannot be kept so.
    pub fn inference_copy(&self, room: Option<Model>, portion: usize, format: WeightFormat) -> Result<(Model, u64)> {
        format.check(self.precision())?;
        let parallel = &self.parallel;
        let size = parallel.inference.size();
        let cut_of = |rank: usize| Cut::share(parallel.tensor_lanes, size, rank % size);
        let cut = cut_of(parallel.world.rank())?;
        let layouts = |content: &Content| -> Vec<Arc<UnitLayout>> {
            UnitLayout::all_cut(&self.spec, content, &cut).into_iter().map(Arc::new).collect()
        };
        // Brings some units of weights or adapters into the targets.
        let bring = |weights: &Weights, content: &Content, units: Range<usize>, targets: &[Option<UnitBuffer>]| {
            let needed = |unit: usize| {
                let id = if unit == 0 { UnitId::Ends } else { UnitId::Block(unit - 1) };
                let of_rank = |rank| -> Result<Holding> {
                    Ok(Holding::of(&UnitLayout::cut(&self.spec, content, id, &cut_of(rank)?)))
                };
                (0..parallel.world.size()).map(of_rank).collect::<Result<Vec<_>>>()
            };
            let read = |unit: usize, back: &mut dyn FnMut(&[f32])| weights.with_held(unit, back);
            self.distributed(weights, content, &read).transfer(units, needed, targets, portion)
        };
        let content = Content::Weights(self.head);
        let (all_layouts, precision) = (layouts(&content), self.precision());
        let is_int8 = format == WeightFormat::Int8;
        // What is kept in 8 bits is made anew each time.
        let mut units = if is_int8 { Vec::new() } else { self.inference_room(room, &all_layouts)? };
        let (all, portion) = (0..self.spec.layers + 1, portion.max(1));
        let mut moved = 0;
        for first in all.clone().step_by(portion) {
            let some = first..all.end.min(first + portion);
            let mut targets = vec![None; all.len()];
            for unit in some.clone() {
                // What is to be rounded comes in f32 first, as adapters are merged before.
                let is_f32 = precision == Precision::F32;
                targets[unit] = Some(if is_f32 { units[unit].clone() } else { UnitBuffer::zeros(&all_layouts[unit])? });
            }
            moved += bring(&self.weights, &content, some.clone(), &targets)?;
            if let Some(adapters) = &self.adapters {
                let content = self.trained_content();
                let layouts = layouts(&content);
                let mut low = vec![None; all.len()];
                for unit in some.clone() {
                    low[unit] = Some(UnitBuffer::zeros(&layouts[unit])?);
                }
                moved += bring(&adapters.weights, &content, some.clone(), &low)?;
                for (unit, adapter) in targets.iter().zip(&low) {
                    let pair = unit.as_ref().zip(adapter.as_ref());
                    pair.map_or(Ok(()), |(unit, adapter)| adapters.merge(&self.spec, unit, adapter))?;
                }
            }
            if is_int8 {
                for wide in targets.into_iter().flatten() {
                    units.push(wide.quantised(&parallel.inference)?);
                }
            } else if precision != Precision::F32 {
                for unit in some {
                    targets[unit].as_ref().map_or(Ok(()), |wide| units[unit].narrow_from(wide))?;
                }
            }
        }
        let alone = Arc::new(Parallel::generating(parallel));
        let (tensor, blocks) = (parallel.inference.clone(), 0..self.spec.layers);
        let (spec, head) = (self.spec.clone(), self.head);
        Ok((Self::assemble(spec, head, Weights::solo(units, precision), cut, blocks, alone, tensor)?, moved))
    }

    /// The buffers of a copy for generation: those of `room`, if it was kept, or new ones.
    fn inference_room(&self, room: Option<Model>, layouts: &[Arc<UnitLayout>]) -> Result<Vec<UnitBuffer>> {
        if let Some(Model { weights: Weights::Whole(whole), .. }) = &room {
            return (0..layouts.len()).map(|index| whole.room(index)).collect();
        }
        let dtype = self.precision().dtype();
        layouts.iter().map(|layout| UnitBuffer::zeros_of(layout, dtype)).collect()
    }

    /// Whether the weights that are trained can generate as they lie: whole units, all blocks, and the same ranks together.
    /// Never with adapters: they are merged, and that into a copy.
    pub fn generates_in_place(&self) -> bool {
        let parallel = &self.parallel;
        let same_ranks = parallel.mesh.tensor == parallel.inference.size();
        self.adapters.is_none() && !self.weights.is_sliced() && parallel.mesh.pipeline == 1 && same_ranks
    }
}

impl Weights {
    /// A deep copy.
    pub(super) fn duplicate(&self) -> Result<Self> {
        Ok(match self {
            Weights::Whole(whole) => Weights::Whole(Arc::new(whole.duplicate()?)),
            Weights::Sliced(sliced) => Weights::Sliced(Arc::new(sliced.duplicate()?)),
        })
    }

    /// Runs `read` on what this rank holds of a unit: all of it, or its slice.
    pub(crate) fn with_held(&self, index: usize, read: impl FnOnce(&[f32])) -> Result<()> {
        match self {
            // Weights that are never trained may be kept in bf16 only.
            Weights::Whole(whole) => with_slice(whole.master(index)?.widened()?.flat(), read)?,
            Weights::Sliced(sliced) => sliced.with_slice(index, read),
        }
        Ok(())
    }
}
