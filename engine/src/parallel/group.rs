//! A communicator with its own count of calls, and the same calls on tensors.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::Tensor;
use tandem_collective::{Collective, Solo, Tag};
use tandem_kernels::slice::with_slice_mut;

use crate::Result;

/// Ranks that work together on one thing.
///
/// All of them make the same calls in the same order, so that a count of calls is enough to tell calls apart.
#[derive(Debug)]
pub struct Group {
    world: Arc<dyn Collective>,
    calls: AtomicU64,
}

impl Group {
    /// The ranks of `world`.
    pub fn new(world: Arc<dyn Collective>) -> Self {
        Self { world, calls: AtomicU64::new(0) }
    }

    /// One rank alone.
    pub fn solo() -> Self {
        Self::new(Arc::new(Solo::new()))
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        self.world.world()
    }

    /// This rank, `0..size`.
    pub fn rank(&self) -> usize {
        self.world.rank()
    }

    /// Whether there is nobody to talk to.
    pub fn is_solo(&self) -> bool {
        self.size() == 1
    }

    /// The communicator.
    pub fn world(&self) -> &Arc<dyn Collective> {
        &self.world
    }

    /// Tag of the next call, made at `site`.
    pub fn tag(&self, site: &'static str) -> Tag {
        Tag::new(site, self.calls.fetch_add(1, Ordering::Relaxed))
    }

    /// Replaces `x` on every rank by the sum over the ranks, in the fixed tree.
    ///
    /// # Errors
    /// If ranks have lost each other.
    pub fn all_reduce(&self, site: &'static str, x: &Tensor) -> Result<()> {
        if !self.is_solo() {
            with_slice_mut(x, |values| self.world.all_reduce_sum_f32(self.tag(site), values))??;
        }
        Ok(())
    }

    /// Replaces `values` on every rank by the sum over the ranks.
    ///
    /// # Errors
    /// If ranks have lost each other.
    pub fn sum(&self, site: &'static str, values: &mut [f64]) -> Result<()> {
        if !self.is_solo() {
            self.world.all_reduce_sum_f64(self.tag(site), values)?;
        }
        Ok(())
    }

    /// What every rank has to say, in the order of the ranks.
    ///
    /// # Errors
    /// If ranks have lost each other.
    pub fn gather(&self, site: &'static str, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        if self.is_solo() {
            return Ok(vec![mine.to_vec()]);
        }
        Ok(self.world.all_gather_varied(self.tag(site), mine)?)
    }
}
