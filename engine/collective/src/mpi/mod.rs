//! Ranks are processes that an MPI launcher has started.
//!
//! MPI moves the bytes; everything that keeps a job from hanging is done here, because MPI does none of it: every call has
//! a deadline and names who is missing, every call is compared with what the peers are calling, reductions follow the
//! fixed tree, and a rank that panics ends the job ([`kill`]) instead of waiting in MPI's own clean-up for ranks that wait
//! for it. Only messages between two ranks are used: MPI's collectives can neither be compared nor blamed on anyone.
//!
//! * [`Mpi::connect`] once per process, [`finish`] at the end of a run that succeeded, [`kill`] at the end of one that did
//!   not. A process that ends without either is killed by most launchers, which is as well.
//! * MPI makes progress only inside its calls. A rank that computes for long does not answer its peers; what it sends in
//!   small messages has left, what it sends in large ones may wait for its next call.
//! * A panic anywhere in the process, caught or not, ends the job: by the time it unwinds, the peers already wait.

mod calls;
mod exchange;
mod group;
mod header;
mod library;
mod overlap;
mod point;
mod pool;
mod process;
mod reduce;
mod stage;
mod stream;

use std::fmt;
use std::io::Write;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use self::group::Group;
use self::library::Comm;
use self::process::Process;
use crate::collective::Collective;
use crate::error::{Error, Result};
use crate::launch::detect;
use crate::tag::Tag;
use crate::topology::Topology;

/// The exit code of a job in which a rank panicked.
pub const PANIC_CODE: i32 = 98;

/// The world of this process, for [`finish`].
static WORLD: OnceLock<Arc<Mpi>> = OnceLock::new();

/// A communicator over MPI.
pub struct Mpi {
    group: Arc<Group>,
}

impl fmt::Debug for Mpi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mpi(rank {} of {})", self.group.rank(), self.group.world())
    }
}

impl Mpi {
    /// Joins the world that the launcher has started; without a launcher, a world of one. `deadline` bounds the wait for a
    /// peer in every later call.
    ///
    /// # Errors
    /// [`Error::Launch`] on the second call in a process, if MPI sees another number of ranks than the launcher has
    /// started (a launcher of another MPI), or if it does not allow threads; [`Error::Timeout`]; [`Error::Backend`].
    pub fn connect(deadline: Duration) -> Result<Arc<dyn Collective>> {
        let launcher = detect(|name| std::env::var(name).ok())?;
        if WORLD.get().is_some() || library::is_running() {
            return Err(Error::Launch("this process is already connected through MPI".into()));
        }
        let world = library::initialize()?;
        let (rank, size) = (world.rank()?, world.size()?);
        if launcher.kind.is_mpi() && launcher.world != size {
            // Each such process is a world of its own, so this does not wait for anyone.
            library::finalize()?;
            return Err(Error::Launch(format!(
                "the launcher started {} ranks but this MPI sees {size}: {} is not of the MPI library that this binary \
                 was built with; use the mpirun that belongs to it (with srun, try --mpi=pmix)",
                launcher.world, launcher.kind
            )));
        }
        kill_on_panic(rank);
        let comm = duplicate(world, deadline, rank)?;
        let notices = duplicate(world, deadline, rank)?;
        let process = Arc::new(Process::new(rank, size, deadline, notices)?);
        let members: Vec<usize> = (0..size).collect();
        let alone = |topology| Group::new(Arc::clone(&process), comm, rank, members.clone(), topology);
        let first = Self { group: alone(Topology::single_node(size)) };
        let names = first.all_gather_varied(Tag::new("machines", 0), library::machine()?.as_bytes())?;
        let label = |name: &Vec<u8>| names.iter().position(|other| other == name).unwrap_or(0);
        let topology = Topology::new(&names.iter().map(label).collect::<Vec<_>>());
        let world = Arc::new(Self { group: alone(topology) });
        Ok(WORLD.get_or_init(|| world).clone())
    }
}

fn duplicate(comm: Comm, deadline: Duration, rank: usize) -> Result<Comm> {
    let mut duplicate = comm.start_duplicate()?;
    let since = Instant::now();
    loop {
        if let Some(done) = duplicate.poll()? {
            return Ok(done);
        }
        if since.elapsed() >= deadline {
            // MPI does not say who has not come.
            return Err(Error::Timeout { rank, tag: Tag::new("connect", 0), deadline, missing: Vec::new() });
        }
        std::thread::yield_now();
    }
}

/// Unwinding would end in MPI's clean-up, which waits for the peers, which wait for this rank.
fn kill_on_panic(rank: usize) {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        before(panic);
        // In one piece, so that the words of several ranks do not mix; nothing can be done if nobody listens.
        let _ = std::io::stderr().write_all(format!("rank {rank} panicked; ending the job\n").as_bytes());
        library::abort_job(PANIC_CODE);
    }));
}

/// Leaves the world in an orderly way: waits for all ranks and for everything sent, then finalizes MPI. Call it once, at the
/// end of a run that has succeeded; without a connection it does nothing. No call is possible after it.
///
/// # Errors
/// As any call: a peer that does not come is a [`Timeout`](Error::Timeout), after which [`kill`] is due.
pub fn finish() -> Result<()> {
    let Some(world) = WORLD.get() else { return Ok(()) };
    if !library::is_running() {
        return Ok(());
    }
    let process = world.group.process();
    process.drain()?;
    world.barrier(Tag::new("finish", 0))?;
    process.drain()?;
    process.close()?;
    library::finalize()
}

/// Ends the whole job with exit code `code`, which should not be 0, without waiting for anyone. Print the reason first.
pub fn kill(code: i32) -> ! {
    library::abort_job(code);
    std::process::exit(code)
}
