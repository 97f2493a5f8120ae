//! The mean over the ranks of one number for each parameter, in one bit each, with error feedback.

use std::sync::Arc;

use tandem_collective::compress::{Compression, compressed_all_reduce};

use crate::Result;
use crate::model::Model;
use crate::model::unit::{UnitId, UnitLayout};
use crate::parallel::{Group, Placement};

/// One buffer of what only this rank has.
pub(crate) struct LocalBuffer<'a> {
    /// What it holds.
    pub(crate) what: &'static str,
    /// Of which unit.
    pub(crate) unit: UnitId,
    pub(crate) values: &'a [f32],
}

/// The ranks, and what each has not yet told the others, by unit.
#[derive(Debug)]
pub(in crate::train) struct Exchange {
    data: Arc<Group>,
    layouts: Vec<Arc<UnitLayout>>,
    errors: Vec<Compression>,
}

impl Exchange {
    pub(super) fn new(model: &Model, placement: &Placement) -> Self {
        let (data, layouts) = (placement.parallel.data.clone(), model.trained_layouts());
        let errors = layouts.iter().map(|layout| Compression::new(layout.parameters(), data.size()));
        Self { errors: errors.collect(), data, layouts }
    }

    /// Replaces the numbers of a unit on every rank by about their mean over the ranks, the same bits everywhere.
    pub(super) fn mean(&mut self, unit: usize, site: &'static str, values: &mut [f32]) -> Result<()> {
        let layout = &self.layouts[unit];
        let mut packed = pack(layout, values);
        let tag = self.data.tag(site);
        compressed_all_reduce(&**self.data.world(), tag, &mut packed, &mut self.errors[unit])?;
        unpack(layout, &packed, values);
        Ok(())
    }

    /// Forgets what was not told.
    pub(super) fn reset(&mut self) {
        self.errors.iter_mut().for_each(Compression::reset);
    }

    pub(super) fn local(&self) -> Vec<LocalBuffer<'_>> {
        let mut buffers = Vec::new();
        for (errors, layout) in self.errors.iter().zip(&self.layouts) {
            buffers.push(LocalBuffer { what: "worker_error", unit: layout.id, values: &errors.worker_error });
            buffers.push(LocalBuffer { what: "server_error", unit: layout.id, values: &errors.server_error });
        }
        buffers
    }

    /// In the order of [`Self::local`].
    pub(super) fn local_mut(&mut self) -> Vec<&mut [f32]> {
        let errors = self.errors.iter_mut();
        errors.flat_map(|errors| [&mut errors.worker_error[..], &mut errors.server_error[..]]).collect()
    }

    pub(super) fn layouts(&self) -> &[Arc<UnitLayout>] {
        &self.layouts
    }
}

/// The parameters of a unit back to back.
pub(super) fn pack(layout: &UnitLayout, values: &[f32]) -> Vec<f32> {
    let mut packed = Vec::with_capacity(layout.parameters());
    for slot in &layout.params {
        packed.extend_from_slice(&values[slot.offset..slot.offset + slot.len()]);
    }
    packed
}

/// The reverse of [`pack`]; padding stays as it is.
pub(super) fn unpack(layout: &UnitLayout, packed: &[f32], values: &mut [f32]) {
    let mut rest = packed;
    for slot in &layout.params {
        let (own, later) = rest.split_at(slot.len());
        values[slot.offset..slot.offset + slot.len()].copy_from_slice(own);
        rest = later;
    }
}
