//! A world of one: every reduction is already done.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use half::bf16;

use crate::call::{Backend, Traffic};
use crate::collective::Collective;
use crate::error::{Error, Result, check_length};
use crate::status::Status;
use crate::tag::Tag;
use crate::topology::Topology;
use crate::work::{Pending, Shared, Work};

/// The default backend: one rank, no peers, nothing to wait for.
///
/// Messages to itself wait in a queue; receiving from an empty one is a [`Timeout`](Error::Timeout) at once, for nobody
/// else could fill it.
#[derive(Debug)]
pub struct Solo {
    topology: Topology,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    calls: u64,
    mail: VecDeque<(Tag, Vec<u8>)>,
    failure: Option<Error>,
}

impl Solo {
    /// A world of one.
    pub fn new() -> Self {
        Self { topology: Topology::single_node(1), state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a call, unless this world has been aborted.
    fn enter(&self) -> Result<()> {
        let mut state = self.state();
        if let Some(failure) = &state.failure {
            return Err(failure.clone());
        }
        state.calls += 1;
        Ok(())
    }

    fn check_peer(&self, tag: Tag, peer: usize) -> Result<()> {
        if peer == 0 { Ok(()) } else { Err(Error::NoSuchRank { tag, root: peer, world: 1 }) }
    }

    fn copy<T: Copy>(&self, tag: Tag, from: &[T], to: &mut [T]) -> Result<()> {
        check_length(0, tag, "the output", from.len(), to.len())?;
        self.enter()?;
        to.copy_from_slice(from);
        Ok(())
    }

    fn start(&self, tag: Tag, values: Shared) -> Result<Work> {
        self.enter()?;
        Ok(Work::new(Done { tag, values }))
    }
}

impl Default for Solo {
    fn default() -> Self {
        Self::new()
    }
}

/// The result of any operation in a world of one: what was brought.
struct Done {
    tag: Tag,
    values: Shared,
}

impl Pending for Done {
    fn is_ready(&mut self) -> Result<bool> {
        Ok(true)
    }

    fn wait_into(self: Box<Self>, out: &mut [f32]) -> Result<()> {
        let values = (*self.values).as_ref();
        check_length(0, self.tag, "the output", values.len(), out.len())?;
        out.copy_from_slice(values);
        Ok(())
    }
}

impl Collective for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn world(&self) -> usize {
        1
    }

    fn deadline(&self) -> Duration {
        Duration::ZERO
    }

    fn backend(&self) -> Backend {
        Backend::Solo
    }

    fn topology(&self) -> &Topology {
        &self.topology
    }

    fn traffic(&self) -> Traffic {
        Traffic { calls: self.state().calls, ..Traffic::default() }
    }

    fn all_reduce_sum_f32(&self, _tag: Tag, _values: &mut [f32]) -> Result<()> {
        self.enter()
    }

    fn all_reduce_sum_f64(&self, _tag: Tag, _values: &mut [f64]) -> Result<()> {
        self.enter()
    }

    fn all_reduce_max_f64(&self, _tag: Tag, _values: &mut [f64]) -> Result<()> {
        self.enter()
    }

    fn all_reduce_sum_bf16(&self, _tag: Tag, _values: &mut [bf16]) -> Result<()> {
        self.enter()
    }

    fn reduce_scatter_sum_f32(&self, tag: Tag, values: &[f32], mine: &mut [f32]) -> Result<()> {
        self.copy(tag, values, mine)
    }

    fn reduce_scatter_sum_bf16(&self, tag: Tag, values: &[bf16], mine: &mut [bf16]) -> Result<()> {
        self.copy(tag, values, mine)
    }

    fn all_gather(&self, tag: Tag, mine: &[u8], all: &mut [u8]) -> Result<()> {
        self.copy(tag, mine, all)
    }

    fn all_gather_varied(&self, _tag: Tag, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.enter()?;
        Ok(vec![mine.to_vec()])
    }

    fn all_to_all(&self, tag: Tag, send: &[u8], receive: &mut [u8]) -> Result<()> {
        self.copy(tag, send, receive)
    }

    fn broadcast(&self, tag: Tag, _bytes: &mut [u8], root: usize) -> Result<()> {
        self.check_peer(tag, root)?;
        self.enter()
    }

    fn barrier(&self, _tag: Tag) -> Result<()> {
        self.enter()
    }

    fn agree(&self, _tag: Tag, status: Status) -> Result<Status> {
        self.enter()?;
        Ok(status)
    }

    fn send(&self, tag: Tag, bytes: Vec<u8>, to: usize) -> Result<()> {
        self.check_peer(tag, to)?;
        self.enter()?;
        self.state().mail.push_back((tag, bytes));
        Ok(())
    }

    fn receive(&self, tag: Tag, bytes: &mut [u8], from: usize) -> Result<()> {
        self.check_peer(tag, from)?;
        self.enter()?;
        let mut state = self.state();
        let failure = match state.mail.pop_front() {
            None => Error::Timeout { rank: 0, tag, deadline: Duration::ZERO, missing: vec![0] },
            Some((sent, _)) if sent != tag => Error::Desync { rank: 0, called: tag, peer: 0, peer_called: sent },
            Some((_, message)) if message.len() != bytes.len() => {
                Error::LengthMismatch { tag, rank: 0, length: bytes.len(), peer: 0, peer_length: message.len() }
            }
            Some((_, message)) => {
                bytes.copy_from_slice(&message);
                return Ok(());
            }
        };
        state.failure = Some(failure.clone());
        Err(failure)
    }

    fn start_all_gather_f32(&self, tag: Tag, mine: Shared) -> Result<Work> {
        self.start(tag, mine)
    }

    fn start_reduce_scatter_sum_f32(&self, tag: Tag, values: Shared) -> Result<Work> {
        self.start(tag, values)
    }

    fn start_all_reduce_sum_f32(&self, tag: Tag, values: Shared) -> Result<Work> {
        self.start(tag, values)
    }

    fn split(&self, _tag: Tag, color: Option<usize>, _key: usize) -> Result<Option<Arc<dyn Collective>>> {
        self.enter()?;
        Ok(color.map(|_| Arc::new(Self::new()) as Arc<dyn Collective>))
    }

    fn abort(&self, why: &str) {
        let failure = Error::PeerFailed { rank: 0, peer: 0, why: why.to_owned() };
        self.state().failure.get_or_insert(failure);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TAG: Tag = Tag::new("test", 3);

    #[test]
    fn one_rank_keeps_what_it_has() {
        let world: &dyn Collective = &Solo::new();
        assert_eq!((world.rank(), world.world(), world.topology().nodes()), (0, 1, 1));
        let mut values = [1.5, f32::NAN];
        world.all_reduce_sum_f32(TAG, &mut values).unwrap();
        assert_eq!(values[0], 1.5);
        assert!(values[1].is_nan());
        let mut bytes = *b"abc";
        world.broadcast(TAG, &mut bytes, 0).unwrap();
        assert_eq!(&bytes, b"abc");
        world.barrier(TAG).unwrap();
        for status in [Status::Healthy, Status::SkipStep, Status::Stop, Status::Failed] {
            assert_eq!(world.agree(TAG, status).unwrap(), status);
        }
        assert_eq!(world.traffic(), Traffic { sent_bytes: 0, received_bytes: 0, calls: 7 });
    }

    #[test]
    fn a_root_outside_the_world_is_refused() {
        let error = Solo::new().broadcast(TAG, &mut [], 1).unwrap_err();
        assert_eq!(error.to_string(), "test[3]: rank 1 does not exist in a world of 1");
    }

    #[test]
    fn messages_to_itself_are_checked() {
        let world = Solo::new();
        world.send(TAG, vec![1, 2], 0).unwrap();
        world.send(TAG, vec![3], 0).unwrap();
        let mut two = [0; 2];
        world.receive(TAG, &mut two, 0).unwrap();
        assert_eq!(two, [1, 2]);
        let error = world.receive(TAG, &mut two, 0).unwrap_err();
        assert_eq!(error, Error::LengthMismatch { tag: TAG, rank: 0, length: 2, peer: 0, peer_length: 1 });
        assert_eq!(world.barrier(TAG).unwrap_err(), error, "the first failure stays");
        let error = Solo::new().receive(TAG, &mut two, 0).unwrap_err();
        assert!(matches!(error, Error::Timeout { .. }), "{error}");
    }

    #[test]
    fn work_refuses_an_output_of_another_length() {
        let world = Solo::new();
        let values: Shared = Arc::new(vec![1.0, 2.0]);
        let work = world.start_all_reduce_sum_f32(TAG, values.clone()).unwrap();
        assert!(matches!(work.wait_into(&mut [0.0; 3]), Err(Error::WrongLength { expected: 2, got: 3, .. })));
        let mut out = [0.0; 2];
        let mut work = world.start_all_gather_f32(TAG, values).unwrap();
        assert!(work.is_ready().unwrap());
        work.wait_into(&mut out).unwrap();
        assert_eq!(out, [1.0, 2.0]);
    }

    #[test]
    fn an_aborted_world_stays_so() {
        let world = Solo::new();
        world.abort("first");
        world.abort("second");
        assert_eq!(world.barrier(TAG).unwrap_err().to_string(), "rank 0: rank 0 failed: first");
    }
}
