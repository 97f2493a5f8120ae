//! A rank with a fault that strikes at one of its calls.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use half::bf16;
use tandem_collective::{Backend, Collective, Error, Result, Shared, Status, Tag, Topology, Traffic, Work};

/// What a rank says that is made to die.
pub(crate) const STRUCK: &str = "this rank was to die";

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The rank's thread panics.
    Dies,
    /// The rank does nothing for longer than the deadline.
    Hangs,
    /// The rank finds an error of its own and leaves.
    Fails,
    /// The rank's numbers are no numbers.
    Nan,
}

/// Counts calls, and strikes at one of them.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) fault: Option<Fault>,
    pub(crate) at: usize,
    pub(crate) calls: AtomicUsize,
}

/// A communicator whose rank is struck by a plan; groups made of it share the plan.
#[derive(Debug)]
pub(crate) struct Faulty {
    inner: Arc<dyn Collective>,
    plan: Arc<Plan>,
}

impl Faulty {
    pub(crate) fn wrap(inner: Arc<dyn Collective>, plan: Arc<Plan>) -> Arc<dyn Collective> {
        Arc::new(Self { inner, plan })
    }

    /// Whether this call's numbers are to be spoiled; other faults strike here.
    fn strike(&self) -> Result<bool> {
        let call = self.plan.calls.fetch_add(1, Ordering::Relaxed);
        match self.plan.fault.filter(|_| call == self.plan.at) {
            None => Ok(false),
            Some(Fault::Dies) => std::panic::panic_any(STRUCK),
            Some(Fault::Hangs) => {
                std::thread::sleep(2 * self.inner.deadline() + Duration::from_millis(200));
                Ok(false)
            }
            Some(Fault::Fails) => {
                self.inner.abort("this rank was to fail");
                let (rank, why) = (self.inner.rank(), "this rank was to fail".to_owned());
                Err(Error::PeerFailed { rank, peer: rank, why })
            }
            Some(Fault::Nan) => Ok(true),
        }
    }

    fn values(&self, values: &mut [f32]) -> Result<()> {
        if self.strike()? {
            values.fill(f32::NAN);
        }
        Ok(())
    }

    fn shared(&self, values: Shared) -> Result<Shared> {
        Ok(if self.strike()? { Arc::new(vec![f32::NAN; (*values).as_ref().len()]) } else { values })
    }
}

impl Collective for Faulty {
    fn rank(&self) -> usize {
        self.inner.rank()
    }
    fn world(&self) -> usize {
        self.inner.world()
    }
    fn deadline(&self) -> Duration {
        self.inner.deadline()
    }
    fn backend(&self) -> Backend {
        self.inner.backend()
    }
    fn topology(&self) -> &Topology {
        self.inner.topology()
    }
    fn traffic(&self) -> Traffic {
        self.inner.traffic()
    }
    fn all_reduce_sum_f32(&self, tag: Tag, values: &mut [f32]) -> Result<()> {
        self.values(values)?;
        self.inner.all_reduce_sum_f32(tag, values)
    }
    fn all_reduce_sum_f64(&self, tag: Tag, values: &mut [f64]) -> Result<()> {
        if self.strike()? {
            values.fill(f64::NAN);
        }
        self.inner.all_reduce_sum_f64(tag, values)
    }
    fn all_reduce_max_f64(&self, tag: Tag, values: &mut [f64]) -> Result<()> {
        self.strike()?;
        self.inner.all_reduce_max_f64(tag, values)
    }
    fn all_reduce_sum_bf16(&self, tag: Tag, values: &mut [bf16]) -> Result<()> {
        self.strike()?;
        self.inner.all_reduce_sum_bf16(tag, values)
    }
    fn reduce_scatter_sum_f32(&self, tag: Tag, values: &[f32], mine: &mut [f32]) -> Result<()> {
        self.strike()?;
        self.inner.reduce_scatter_sum_f32(tag, values, mine)
    }
    fn reduce_scatter_sum_bf16(&self, tag: Tag, values: &[bf16], mine: &mut [bf16]) -> Result<()> {
        self.strike()?;
        self.inner.reduce_scatter_sum_bf16(tag, values, mine)
    }
    fn all_gather(&self, tag: Tag, mine: &[u8], all: &mut [u8]) -> Result<()> {
        self.strike()?;
        self.inner.all_gather(tag, mine, all)
    }
    fn all_gather_f32(&self, tag: Tag, mine: &[f32], all: &mut [f32]) -> Result<()> {
        match self.strike()? {
            true => self.inner.all_gather_f32(tag, &vec![f32::NAN; mine.len()], all),
            false => self.inner.all_gather_f32(tag, mine, all),
        }
    }
    fn all_gather_varied(&self, tag: Tag, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.strike()?;
        self.inner.all_gather_varied(tag, mine)
    }
    fn all_to_all(&self, tag: Tag, send: &[u8], receive: &mut [u8]) -> Result<()> {
        self.strike()?;
        self.inner.all_to_all(tag, send, receive)
    }
    fn broadcast(&self, tag: Tag, bytes: &mut [u8], root: usize) -> Result<()> {
        self.strike()?;
        self.inner.broadcast(tag, bytes, root)
    }
    fn barrier(&self, tag: Tag) -> Result<()> {
        self.strike()?;
        self.inner.barrier(tag)
    }
    fn agree(&self, tag: Tag, status: Status) -> Result<Status> {
        self.strike()?;
        self.inner.agree(tag, status)
    }
    fn send(&self, tag: Tag, bytes: Vec<u8>, to: usize) -> Result<()> {
        self.strike()?;
        self.inner.send(tag, bytes, to)
    }
    fn receive(&self, tag: Tag, bytes: &mut [u8], from: usize) -> Result<()> {
        self.strike()?;
        self.inner.receive(tag, bytes, from)
    }
    fn start_all_gather_f32(&self, tag: Tag, mine: Shared) -> Result<Work> {
        let mine = self.shared(mine)?;
        self.inner.start_all_gather_f32(tag, mine)
    }
    fn start_reduce_scatter_sum_f32(&self, tag: Tag, values: Shared) -> Result<Work> {
        let values = self.shared(values)?;
        self.inner.start_reduce_scatter_sum_f32(tag, values)
    }
    fn start_all_reduce_sum_f32(&self, tag: Tag, values: Shared) -> Result<Work> {
        let values = self.shared(values)?;
        self.inner.start_all_reduce_sum_f32(tag, values)
    }
    fn split(&self, tag: Tag, color: Option<usize>, key: usize) -> Result<Option<Arc<dyn Collective>>> {
        self.strike()?;
        let part = self.inner.split(tag, color, key)?;
        Ok(part.map(|part| Faulty::wrap(part, self.plan.clone())))
    }
    fn abort(&self, why: &str) {
        self.inner.abort(why);
    }
}
