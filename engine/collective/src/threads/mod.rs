//! Ranks as threads of one process: how a laptop, the tests and a single machine run, without a launcher.
//!
//! Ranks meet at numbered calls. Small buffers are copied into the meeting: one rendezvous. Large ones are lent to it: each
//! rank reads (and for an all_reduce writes) its own slice in all peers' buffers in one pass, then all leave together.

mod blocking;
mod entry;
mod group;
mod pending;
mod rank;
mod stream;
mod world;

use std::sync::Arc;
use std::time::Duration;

use crate::collective::Collective;
use crate::topology::Topology;
use group::Group;
use rank::Rank;
use world::World;

/// Makes worlds of threads.
///
/// A rank whose handle is dropped by a panic ends the world at once (see also [`AbortOnPanic`](crate::AbortOnPanic), for
/// handles that are shared), and so does one whose handle is gone while others wait for it.
#[derive(Debug, Clone, Copy)]
pub struct Threads;

impl Threads {
    /// The handles of `ranks` ranks, one for each thread, on one machine.
    ///
    /// # Panics
    /// If `ranks` is 0.
    pub fn world(ranks: usize, deadline: Duration) -> Vec<Arc<dyn Collective>> {
        Self::with_topology(Topology::single_node(ranks), deadline)
    }

    /// [`Self::world`], but the ranks believe in `topology`: how code for several machines is tested on one.
    ///
    /// # Panics
    /// If the topology has no ranks.
    pub fn with_topology(topology: Topology, deadline: Duration) -> Vec<Arc<dyn Collective>> {
        assert!(topology.world() > 0, "a world has at least one rank");
        let members: Vec<usize> = (0..topology.world()).collect();
        let group = Group::new(Arc::new(World::new(deadline)), members.clone(), topology);
        members.into_iter().map(|rank| Rank::handle(Arc::clone(&group), rank)).collect()
    }
}
