//! From one process to all ranks of a run, and back to one outcome.
//!
//! A run is one rank by default. `--ranks N` makes N of them in this process, each a thread with its own pool of threads;
//! a process that `mpirun` or `srun` has started is one rank of theirs. All ranks do the same; the first one, the
//! *leader*, alone writes files and speaks to people. A rank that fails wakes the others, which then leave too.

mod failures;
mod process;
mod same;
mod share;
mod team;
mod threads;

use std::sync::Arc;
use std::time::Duration;

use tandem_collective::launch::{self, Connected};
use tandem_collective::{Collective, Hierarchical, Topology};
use tracing::subscriber::NoSubscriber;

pub use failures::{RankFailure, RankFailures};
pub(crate) use share::share;
pub use team::{Share, Team};
pub use threads::on_threads;

use crate::cli::{LOG_VARIABLE, Launch, Outcome, set_threads};
use crate::config::{Origin, Stage};
use crate::error::{Result, StageError};

/// The rank that writes files and speaks to people.
pub const LEADER: usize = 0;

/// Runs `body` on every rank that the command line (`asked`, of `--ranks`) or the launcher of this process calls for, and
/// checks before that they all are to do the same.
///
/// # Errors
/// A number of ranks on which `stages` cannot run, ranks that do not find each other or differ, and how `body` ends.
pub fn start(
    launch: Launch,
    stages: &[Stage],
    asked: Option<usize>,
    body: impl Fn(&Launch) -> Result<Outcome> + Sync,
) -> Result<Outcome> {
    if launch.dry_run {
        // Under a launcher one of its processes is enough to say it.
        let place = launch::detect(|name| std::env::var(name).ok())?;
        return if place.rank == LEADER { body(&launch) } else { Ok(Outcome::Finished) };
    }
    let threads = launch.config.run.threads;
    let deadline = Duration::from_secs_f64(launch.config.parallel.timeout_s);
    match launch::connect(deadline, asked)? {
        Connected::Threads { ranks } => {
            let launch = Launch { ranks_here: ranks, ..launch.on_mesh_of(ranks, stages)? };
            let worlds = tandem_collective::Threads::world(ranks, deadline);
            let outcomes = on_threads(worlds, threads, |world| run_rank(&launch, world, &body))?;
            // All ranks stop together or not at all.
            outcomes.first().copied().ok_or_else(|| StageError::bug("a world without ranks"))
        }
        Connected::Process { world, .. } => {
            let launch = launch.on_mesh_of(world.world(), stages)?;
            if world.world() == 1 {
                return threads::alone(threads, || body(&launch));
            }
            set_threads(threads)?;
            process::run(&world, || run_rank(&launch, Arc::clone(&world), &body))
        }
    }
}

/// One rank's part of a run.
fn run_rank(launch: &Launch, world: Arc<dyn Collective>, body: impl Fn(&Launch) -> Result<Outcome>) -> Result<Outcome> {
    let launch = launch.on(match launch.config.parallel.hierarchical {
        true => Hierarchical::new(world)?,
        false => world,
    });
    let run = || {
        same::check(&launch)?;
        body(&launch)
    };
    // What the leader says need not be said by all; who asks for more hears everyone.
    if launch.is_leader() || std::env::var_os(LOG_VARIABLE).is_some() {
        if launch.is_leader() {
            warn_of_distance(&launch);
        }
        run()
    } else {
        tracing::subscriber::with_default(NoSubscriber::default(), run)
    }
}

/// Tensor-parallel ranks talk several times per block.
fn warn_of_distance(launch: &Launch) {
    let (tensor, topology) = (launch.mesh.tensor, launch.world.topology());
    if groups_cross_nodes(topology, tensor) {
        tracing::warn!(
            "parallel.tensor = {tensor}: such a group spans more than one of the {} nodes and will be slow; let it divide \
             the ranks of a node",
            topology.nodes()
        );
    }
}

/// Whether any group of `size` neighbouring ranks has members on several nodes.
fn groups_cross_nodes(topology: &Topology, size: usize) -> bool {
    let node = |rank: usize| topology.node_of(rank);
    (0..topology.world()).any(|rank| node(rank) != node(rank - rank % size.max(1)))
}

impl Launch {
    /// The same launch upon the mesh of a world of `ranks`.
    fn on_mesh_of(self, ranks: usize, stages: &[Stage]) -> Result<Self> {
        let mesh = self.config.mesh(ranks, stages, &Origin::Defaults)?;
        Ok(Self { mesh, ..self })
    }
}

#[cfg(test)]
mod tests;
