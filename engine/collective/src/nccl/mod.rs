//! Ranks are GPUs, one each; NCCL moves what is large.
//!
//! NCCL knows nothing of deadlines for single calls, of ranks in different calls, or of f64 statistics. So each world of it
//! stands on a *control* communicator (MPI, or [`Threads`](crate::Threads)): its unique id travels over it, the ranks meet
//! on it before each call, and everything small or not a sum of f32 and bf16 stays on it.
//!
//! * The methods of [`Collective`] take host buffers, stage large ones through the GPU, and keep its promises, the
//!   fixed tree of sums among them: the GPUs exchange parts, the host adds them up.
//! * The `*_device` methods work on buffers of the GPU; see [`Element`] for what they take. Their sums are NCCL's own.
//! * Without libcuda or libnccl there is an error that says so; nothing panics.

mod calls;
mod channel;
mod device;
mod library;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cudarc::driver::{CudaContext, CudaStream};
use cudarc::nccl::{result, sys};

use self::channel::{Channel, Fate};
pub use self::device::Element;
use crate::bytes::{as_bytes, as_bytes_mut};
use crate::call::Operation;
use crate::collective::Collective;
use crate::error::{Error, Result};
use crate::status::Status;
use crate::tag::Tag;

/// A communicator over NCCL, and the control communicator beside it.
pub struct Nccl {
    rank: usize,
    world: usize,
    /// Small and exact things, and messages.
    control: Arc<dyn Collective>,
    /// Where the ranks meet before a call: a communicator of its own, so that it does not count as traffic.
    meetings: Arc<dyn Collective>,
    channel: Channel,
    sent: AtomicU64,
    received: AtomicU64,
    calls: AtomicU64,
}

impl fmt::Debug for Nccl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Nccl(rank {} of {}, over {:?})", self.rank, self.world, self.control)
    }
}

impl Nccl {
    /// Joins the ranks of `control`, this one with GPU number `device` of its machine (the local rank, unless
    /// `CUDA_VISIBLE_DEVICES` shows one GPU only). Collective; every rank needs a GPU of its own.
    ///
    /// # Errors
    /// [`Error::Launch`] on every rank if one of them has no libcuda, libnccl or GPU: the rank itself says what is missing;
    /// [`Error::Backend`]; errors of the control communicator.
    pub fn connect(control: &Arc<dyn Collective>, device: usize) -> Result<Arc<Self>> {
        let tag = Tag::new("nccl connect", 0);
        let rank = control.rank();
        let ready = library::check_present()
            .and_then(|()| CudaContext::new(device).map_err(|error| library::cuda_error(rank, error)));
        // Nobody may wait in NCCL for a rank that cannot come.
        let status = if ready.is_ok() { Status::Healthy } else { Status::Failed };
        let worst = control.agree(tag, status)?;
        let context = ready?;
        if worst != Status::Healthy {
            return Err(Error::Launch(
                "another rank has no GPU or no NCCL; its own message says what is missing".into(),
            ));
        }
        let mut id = sys::ncclUniqueId { internal: [0; 128] };
        let mut made = Ok(());
        if rank == 0 {
            match result::get_uniqueid() {
                Ok(unique) => id = unique,
                Err(error) => made = Err(library::nccl_error(rank, &error)),
            }
        }
        control.broadcast(tag, as_bytes_mut(&mut id.internal), 0)?;
        made?;
        if id.internal.iter().all(|&byte| byte == 0) {
            return Err(Error::Launch("rank 0 could not make an NCCL id; its own message says why".into()));
        }
        let fate = Fate::new(control)?;
        let channel = Channel::join(fate, &context, rank, control.world(), id)?;
        Ok(Arc::new(Self::new(Arc::clone(control), channel)?))
    }

    fn new(control: Arc<dyn Collective>, channel: Channel) -> Result<Self> {
        let (rank, world) = (control.rank(), control.world());
        let Some(meetings) = control.split(Tag::new("nccl meetings", 0), Some(0), rank)? else {
            return Err(Error::Launch("the control communicator gave no group for meetings".into()));
        };
        let (sent, received, calls) = Default::default();
        Ok(Self { rank, world, control, meetings, channel, sent, received, calls })
    }

    /// The stream on which everything of this communicator runs.
    pub fn stream(&self) -> &Arc<CudaStream> {
        self.channel.stream()
    }

    /// The communicator that carries small things.
    pub fn control(&self) -> &Arc<dyn Collective> {
        &self.control
    }

    /// Makes sure that all ranks are in the same call, with buffers of one length.
    fn meet(&self, tag: Tag, operation: Operation, length: usize) -> Result<()> {
        self.channel.fate().check()?;
        self.count_call();
        let mine = [calls::code(operation), length as u64];
        let mut all = vec![0_u64; 2 * self.world];
        self.meetings.all_gather(tag, as_bytes(&mine), as_bytes_mut(&mut all))?;
        for (peer, theirs) in all.chunks_exact(2).enumerate() {
            let rank = self.channel.fate().rank;
            let error = if theirs[0] != mine[0] {
                let peer_operation = calls::operation(theirs[0]).unwrap_or(operation);
                Error::OperationMismatch { tag, rank, operation, peer, peer_operation }
            } else if theirs[1] != mine[1] {
                Error::LengthMismatch { tag, rank, length, peer, peer_length: theirs[1] as usize }
            } else {
                continue;
            };
            return Err(self.channel.fate().fail(error));
        }
        Ok(())
    }

    fn check_rank(&self, tag: Tag, rank: usize) -> Result<()> {
        if rank < self.world { Ok(()) } else { Err(Error::NoSuchRank { tag, root: rank, world: self.world }) }
    }

    fn count_call(&self) {
        self.calls.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts bytes sent, of which as many are received.
    fn count(&self, bytes: usize) {
        self.count_each(bytes, bytes);
    }

    fn count_each(&self, sent: usize, received: usize) {
        self.sent.fetch_add(sent as u64, Ordering::Relaxed);
        self.received.fetch_add(received as u64, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::threads::Threads;

    const DEADLINE: Duration = Duration::from_secs(60);

    fn on_device(world: &Arc<Nccl>) {
        let tag = Tag::new("device", 0);
        let stream = Arc::clone(world.stream());
        let mut sums = stream.clone_htod(&[1.5_f32, -2.0]).unwrap();
        world.all_reduce_sum_device(tag, &mut sums).unwrap();
        let mut gathered = stream.alloc_zeros::<f32>(2).unwrap();
        world.all_gather_device(tag, &sums, &mut gathered).unwrap();
        let mut scattered = stream.alloc_zeros::<f32>(2).unwrap();
        world.reduce_scatter_sum_device(tag, &gathered, &mut scattered).unwrap();
        let mut exchanged = stream.alloc_zeros::<f32>(2).unwrap();
        world.all_to_all_device(tag, &scattered, &mut exchanged).unwrap();
        world.broadcast_device(tag, &mut exchanged, 0).unwrap();
        world.synchronize(tag).unwrap();
        assert_eq!(stream.clone_dtoh(&exchanged).unwrap(), [1.5, -2.0]);
        let short = &mut stream.alloc_zeros::<f32>(1).unwrap();
        assert!(matches!(world.all_gather_device(tag, &sums, short), Err(Error::WrongLength { .. })));
    }

    /// With one GPU there is nobody to talk to, but every call is made.
    #[test]
    fn a_world_of_one_gpu_conforms() {
        if let Err(error) = library::check_present() {
            println!("skipped: {error}");
            return;
        }
        let control = Threads::world(1, DEADLINE).remove(0);
        let world = match Nccl::connect(&control, 0) {
            Err(Error::Backend { library: "CUDA", text, .. }) => {
                println!("skipped: no usable GPU: {text}");
                return;
            }
            world => world.unwrap(),
        };
        on_device(&world);
        let group = world.split(Tag::new("group", 0), Some(3), 0).unwrap().unwrap();
        assert_eq!((group.world(), group.backend()), (1, crate::Backend::Nccl));
        let world: Arc<dyn Collective> = world;
        assert!(crate::suite::conformance(&world) > 100);
    }

    /// Missing libraries are an error on every rank: no panic, and nobody waits for the others.
    #[test]
    fn without_libraries_every_rank_says_so() {
        if library::check_present().is_ok() {
            println!("skipped: the libraries are here");
            return;
        }
        std::thread::scope(|scope| {
            for control in Threads::world(2, DEADLINE) {
                scope.spawn(move || {
                    let error = Nccl::connect(&control, control.rank()).unwrap_err();
                    assert!(matches!(&error, Error::Launch(why) if why.contains("lib")), "{error}");
                });
            }
        });
    }

    #[test]
    fn operations_keep_their_codes() {
        for operation in [Operation::AllGather, Operation::ReduceScatterSumBf16, Operation::Broadcast { root: 7 }] {
            assert_eq!(calls::operation(calls::code(operation)), Some(operation));
        }
        assert_eq!(calls::operation(999), None);
    }
}
