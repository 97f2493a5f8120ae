//! Gradients that are added up over ranks or lanes: buffers of units being computed, sums under way, and what has come of them.

use std::collections::VecDeque;
use std::sync::Arc;

use candle_core::Tensor;
use tandem_collective::Work;
use tandem_kernels::slice::{SharedTensor, with_slice};

use super::gradients::Reduction;
use super::slice::Slicing;
use super::sums::Sums;
use super::{Placement, ZeroStage};
use crate::Result;
use crate::model::unit::{UnitBuffer, UnitLayout};

#[derive(Debug)]
pub(super) struct Reduced {
    /// ZeRO-1: the gradient of a whole pass, reduced at its end.
    pub(super) whole: Option<Vec<UnitBuffer>>,
    /// Buffers of units that are being computed.
    pub(super) open: Vec<Option<UnitBuffer>>,
    /// Room for units, some of it perhaps still being read by peers.
    pub(super) room: Vec<Room>,
    pub(super) under_way: VecDeque<(usize, Work)>,
    pub(super) under_way_bytes: usize,
    pub(super) sums: Vec<Sums>,
}

#[derive(Debug)]
pub(super) struct Room {
    pub(super) buffer: UnitBuffer,
    /// Lent to peers that add it up.
    pub(super) lent: Option<Arc<SharedTensor>>,
    pub(super) open: bool,
}

impl Reduced {
    /// Zeroed room for the gradient of a unit.
    pub(super) fn take_room(&mut self, layout: &Arc<UnitLayout>, slicing: Slicing) -> Result<UnitBuffer> {
        for room in &mut self.room {
            if room.lent.as_ref().is_some_and(|lent| Arc::strong_count(lent) == 1) {
                room.lent = None;
            }
        }
        let fits = |room: &&mut Room| {
            !room.open && room.lent.is_none() && room.buffer.storage().elem_count() == slicing.padded()
        };
        if let Some(room) = self.room.iter_mut().find(fits) {
            room.open = true;
            room.buffer = UnitBuffer::on(layout, room.buffer.storage().clone())?;
            room.buffer.clear()?;
            return Ok(room.buffer.clone());
        }
        let buffer = UnitBuffer::zeros_padded(layout, slicing.padded())?;
        self.room.push(Room { buffer: buffer.clone(), lent: None, open: true });
        Ok(buffer)
    }

    pub(super) fn close(&mut self, unit: usize, placement: &Placement, reduction: Reduction) -> Result<()> {
        let Some(buffer) = self.open[unit].take() else { return Ok(()) };
        if placement.parallel.data.is_solo() || reduction == Reduction::Never {
            let sums = &mut self.sums[unit];
            with_slice(buffer.flat(), |values| {
                sums.absorb(lanes_here(placement), |out| {
                    out[..values.len()].copy_from_slice(values);
                    Ok(())
                })
            })??;
            self.give_back(&buffer, None);
            return Ok(());
        }
        let lent = self.start(unit, buffer.storage().clone(), placement)?;
        self.give_back(&buffer, Some(lent));
        Ok(())
    }

    fn give_back(&mut self, buffer: &UnitBuffer, lent: Option<Arc<SharedTensor>>) {
        if let Some(room) =
            self.room.iter_mut().find(|room| room.open && room.buffer.storage().id() == buffer.storage().id())
        {
            room.open = false;
            room.lent = lent;
        }
    }

    /// Starts adding up `values`, whose length is that of all slices, over the data-parallel ranks.
    pub(super) fn start(&mut self, unit: usize, values: Tensor, placement: &Placement) -> Result<Arc<SharedTensor>> {
        let data = &placement.parallel.data;
        let bytes = 4 * values.elem_count();
        let lent = Arc::new(SharedTensor::new(&values)?);
        let tag = data.tag("add up gradients");
        let work = match placement.stage {
            ZeroStage::Zero => data.world().start_all_reduce_sum_f32(tag, lent.clone())?,
            _ => data.world().start_reduce_scatter_sum_f32(tag, lent.clone())?,
        };
        self.under_way.push_back((unit, work));
        self.under_way_bytes += bytes;
        Ok(lent)
    }

    /// Waits for the oldest sum under way and takes it in.
    pub(super) fn absorb(&mut self, placement: &Placement) -> Result<()> {
        let Some((unit, work)) = self.under_way.pop_front() else { return Ok(()) };
        let sums = &mut self.sums[unit];
        let ranks = if placement.stage == ZeroStage::Zero { 1 } else { placement.parallel.data.size() };
        self.under_way_bytes = self.under_way_bytes.saturating_sub(4 * sums.total.len() * ranks);
        sums.absorb(lanes_here(placement), |out| Ok(work.wait_into(out)?))
    }

    pub(super) fn absorb_all(&mut self, placement: &Placement) -> Result<()> {
        while !self.under_way.is_empty() {
            self.absorb(placement)?;
        }
        Ok(())
    }
}

/// Lanes that one rank computes: a power of two.
fn lanes_here(placement: &Placement) -> usize {
    placement.parallel.data_lanes / placement.parallel.mesh.data
}
