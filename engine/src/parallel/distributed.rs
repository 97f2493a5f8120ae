//! Numbers of a model that lie on several ranks, one buffer or slice of a buffer for each unit, on their way elsewhere.

use std::ops::Range;
use std::sync::Arc;

use tandem_kernels::slice::with_slice_mut;

use super::{Holding, Parallel, Slicing, Transfer, bytes, layouts_of, plan};
use crate::model::spec::ModelSpec;
use crate::model::unit::{Content, Cut, UnitBuffer, UnitId, UnitLayout, to_whole};
use crate::{Error, Result};

/// Weights, or an optimizer moment, or an average: one number for each parameter, held by the ranks of a training mesh.
pub(crate) struct Distributed<'a> {
    pub(crate) spec: &'a ModelSpec,
    pub(crate) content: &'a Content,
    pub(crate) parallel: &'a Parallel,
    /// Whether data-parallel ranks hold slices, or each all of it.
    pub(crate) sliced: bool,
    /// Calls back with what this rank holds of a unit.
    pub(crate) read: &'a ReadUnit<'a>,
}

/// Calls back with what this rank holds of a unit.
pub(crate) type ReadUnit<'a> = dyn Fn(usize, &mut dyn FnMut(&[f32])) -> Result<()> + 'a;

impl Distributed<'_> {
    /// What every rank of the mesh holds of a unit.
    fn held(&self, index: usize) -> Result<Vec<Holding>> {
        let (mesh, lanes) = (&self.parallel.mesh, self.parallel.tensor_lanes);
        let of_rank = |rank: usize| -> Result<Holding> {
            let at = mesh.coordinates(rank);
            let cut = Cut::share(lanes, mesh.tensor, at.tensor)?;
            let layout = &layouts_of(self.spec, self.content, mesh, at.pipeline, &cut)[index];
            Ok(match self.sliced {
                false => Holding::of(layout),
                true => Holding::slice_of(layout, Slicing { len: layout.len(), ranks: mesh.data }, at.data),
            })
        };
        (0..mesh.world()).map(of_rank).collect()
    }

    /// Brings units to where they are needed, `portion` of them at once: each rank gets its part of `needed` into its buffer in
    /// `targets`. Returns the bytes that came from other ranks. All ranks of the world call it together.
    pub(crate) fn transfer(
        &self,
        units: Range<usize>,
        needed: impl Fn(usize) -> Result<Vec<Holding>>,
        targets: &[Option<UnitBuffer>],
        portion: usize,
    ) -> Result<u64> {
        let mut moved = 0;
        let all: Vec<usize> = units.collect();
        for units in all.chunks(portion.max(1)) {
            let mut plans = Vec::with_capacity(units.len());
            for &unit in units {
                let missing = || Error::Mesh(format!("unit {unit} is not held whole by the ranks together"));
                plans.push((unit, plan(&self.held(unit)?, &needed(unit)?).ok_or_else(missing)?));
            }
            self.send(&plans)?;
            self.keep(&plans, targets)?;
            moved += self.receive(&plans, targets)?;
        }
        Ok(moved)
    }

    /// Sends what others need. Sends do not wait, so every rank can send before it receives.
    fn send(&self, plans: &[(usize, Vec<Transfer>)]) -> Result<()> {
        let world = &self.parallel.world;
        let (me, size) = (world.rank(), world.size());
        for to in (1..size).map(|step| (me + step) % size) {
            let mut message = Vec::new();
            for (unit, copies) in plans {
                let mut mine = copies.iter().filter(|copy| copy.from == me && copy.to == to).peekable();
                if mine.peek().is_some() {
                    (self.read)(*unit, &mut |held| {
                        for copy in mine.by_ref() {
                            bytes::append(&held[copy.source..copy.source + copy.len], &mut message);
                        }
                    })?;
                }
            }
            if !message.is_empty() {
                world.world().send(TAG, message, to)?;
            }
        }
        Ok(())
    }

    /// Copies what this rank has itself.
    fn keep(&self, plans: &[(usize, Vec<Transfer>)], targets: &[Option<UnitBuffer>]) -> Result<()> {
        let me = self.parallel.world.rank();
        for (unit, copies) in plans {
            let Some(target) = &targets[*unit] else { continue };
            let mut outcome = Ok(());
            (self.read)(*unit, &mut |held| {
                outcome = with_slice_mut(target.flat(), |out| {
                    for copy in copies.iter().filter(|copy| copy.from == me && copy.to == me) {
                        let source = &held[copy.source..copy.source + copy.len];
                        out[copy.target..copy.target + copy.len].copy_from_slice(source);
                    }
                });
            })?;
            outcome?;
        }
        Ok(())
    }

    fn receive(&self, plans: &[(usize, Vec<Transfer>)], targets: &[Option<UnitBuffer>]) -> Result<u64> {
        let world = &self.parallel.world;
        let (me, size) = (world.rank(), world.size());
        let mut moved = 0;
        for from in (1..size).map(|step| (me + size - step) % size) {
            let theirs = |copy: &&Transfer| copy.from == from && copy.to == me;
            let copies = plans.iter().flat_map(|(_, copies)| copies.iter().filter(theirs));
            let elements: usize = copies.map(|copy| copy.len).sum();
            if elements == 0 {
                continue;
            }
            let mut message = vec![0u8; 4 * elements];
            world.world().receive(TAG, &mut message, from)?;
            moved += message.len() as u64;
            let mut rest = message.as_slice();
            for (unit, copies) in plans {
                let Some(target) = &targets[*unit] else { continue };
                with_slice_mut(target.flat(), |out| {
                    for copy in copies.iter().filter(theirs) {
                        let (part, later) = rest.split_at(4 * copy.len);
                        bytes::fill(&mut out[copy.target..copy.target + copy.len], part);
                        rest = later;
                    }
                })?;
            }
        }
        Ok(moved)
    }

    /// Unit `index` in the whole layout on rank 0 of the world; `None` on all others. All ranks call it together.
    pub(crate) fn whole_unit(&self, index: usize) -> Result<Option<UnitBuffer>> {
        let world = &self.parallel.world;
        let id = if index == 0 { UnitId::Ends } else { UnitId::Block(index - 1) };
        let common = Arc::new(UnitLayout::cut(self.spec, self.content, id, &Cut::whole(self.parallel.tensor_lanes)));
        let mut targets = vec![None; self.spec.layers + 1];
        if world.rank() == 0 {
            targets[index] = Some(UnitBuffer::zeros(&common)?);
        }
        let needed = |_| {
            let mut all = vec![Holding::default(); world.size()];
            all[0] = Holding::of(&common);
            Ok(all)
        };
        self.transfer(index..index + 1, needed, &targets, 1)?;
        targets[index].take().map(|unit| to_whole(self.spec, self.content, &unit)).transpose()
    }
}

/// Messages between one pair of ranks arrive in order, and both know their lengths.
const TAG: tandem_collective::Tag = tandem_collective::Tag::new("units to another layout", 0);
