//! The trait, call by call.

use std::sync::Arc;
use std::time::Duration;

use half::bf16;

use super::group::{Group, Meeting};
use super::overlap::{Kind, start};
use super::stage::{Advance, complete, drive};
use super::{Mpi, exchange, point, reduce};
use crate::bytes::as_bytes;
use crate::call::{Backend, Operation, Traffic};
use crate::collective::Collective;
use crate::error::{Error, Result, check_length};
use crate::status::Status;
use crate::tag::Tag;
use crate::topology::Topology;
use crate::tree::{MaxF64, SumBf16, SumF32, SumF64};
use crate::work::{Shared, Work};

impl Mpi {
    fn length(&self, tag: Tag, what: &'static str, expected: usize, got: usize) -> Result<()> {
        check_length(self.group.process().rank(), tag, what, expected, got)
    }
}

impl Collective for Mpi {
    fn rank(&self) -> usize {
        self.group.rank()
    }

    fn world(&self) -> usize {
        self.group.world()
    }

    fn deadline(&self) -> Duration {
        self.group.process().deadline()
    }

    fn backend(&self) -> Backend {
        Backend::Mpi
    }

    fn topology(&self) -> &Topology {
        &self.group.topology
    }

    fn traffic(&self) -> Traffic {
        self.group.traffic()
    }

    fn all_reduce_sum_f32(&self, tag: Tag, values: &mut [f32]) -> Result<()> {
        let call = self.group.next_call(tag, Operation::AllReduceSumF32, values.len())?;
        reduce::all_reduce::<SumF32>(&self.group, call, values)
    }

    fn all_reduce_sum_f64(&self, tag: Tag, values: &mut [f64]) -> Result<()> {
        let call = self.group.next_call(tag, Operation::AllReduceSumF64, values.len())?;
        reduce::all_reduce::<SumF64>(&self.group, call, values)
    }

    fn all_reduce_max_f64(&self, tag: Tag, values: &mut [f64]) -> Result<()> {
        let call = self.group.next_call(tag, Operation::AllReduceMaxF64, values.len())?;
        reduce::all_reduce::<MaxF64>(&self.group, call, values)
    }

    fn all_reduce_sum_bf16(&self, tag: Tag, values: &mut [bf16]) -> Result<()> {
        let call = self.group.next_call(tag, Operation::AllReduceSumBf16, values.len())?;
        reduce::all_reduce::<SumBf16>(&self.group, call, values)
    }

    fn reduce_scatter_sum_f32(&self, tag: Tag, values: &[f32], mine: &mut [f32]) -> Result<()> {
        self.length(tag, "values of a reduce_scatter", mine.len() * self.world(), values.len())?;
        let call = self.group.next_call(tag, Operation::ReduceScatterSumF32, values.len())?;
        reduce::reduce_scatter::<SumF32>(&self.group, call, values, mine)
    }

    fn reduce_scatter_sum_bf16(&self, tag: Tag, values: &[bf16], mine: &mut [bf16]) -> Result<()> {
        self.length(tag, "values of a reduce_scatter", mine.len() * self.world(), values.len())?;
        let call = self.group.next_call(tag, Operation::ReduceScatterSumBf16, values.len())?;
        reduce::reduce_scatter::<SumBf16>(&self.group, call, values, mine)
    }

    fn all_gather(&self, tag: Tag, mine: &[u8], all: &mut [u8]) -> Result<()> {
        self.length(tag, "result of an all_gather", mine.len() * self.world(), all.len())?;
        let call = self.group.next_call(tag, Operation::AllGather, mine.len())?;
        exchange::all_gather(&self.group, call, mine, all)
    }

    fn all_gather_varied(&self, tag: Tag, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        let call = self.group.next_call(tag, Operation::AllGatherVaried, mine.len())?;
        exchange::all_gather_varied(&self.group, call, mine)
    }

    fn all_to_all(&self, tag: Tag, send: &[u8], receive: &mut [u8]) -> Result<()> {
        self.length(tag, "bytes of an all_to_all", send.len().next_multiple_of(self.world()), send.len())?;
        self.length(tag, "result of an all_to_all", send.len(), receive.len())?;
        let call = self.group.next_call(tag, Operation::AllToAll, send.len())?;
        exchange::all_to_all(&self.group, call, send, receive)
    }

    fn broadcast(&self, tag: Tag, bytes: &mut [u8], root: usize) -> Result<()> {
        self.group.check_rank(tag, root)?;
        let call = self.group.next_call(tag, Operation::Broadcast { root }, bytes.len())?;
        exchange::broadcast(&self.group, call, bytes, root)
    }

    fn barrier(&self, tag: Tag) -> Result<()> {
        let call = self.group.next_call(tag, Operation::Barrier, 0)?;
        complete(&self.group, tag, &mut Meeting::start(&self.group, call, |_| &[])?)
    }

    fn agree(&self, tag: Tag, status: Status) -> Result<Status> {
        let call = self.group.next_call(tag, Operation::Agree, 1)?;
        let mine = [status.code()];
        let mut meeting = Meeting::start(&self.group, call, |_| &mine)?;
        complete(&self.group, tag, &mut meeting)?;
        let of = |peer: usize| Status::from_code(meeting.data(peer).first().copied().unwrap_or(u8::MAX));
        Ok(self.group.peers().map(of).fold(status, Status::max))
    }

    fn send(&self, tag: Tag, bytes: Vec<u8>, to: usize) -> Result<()> {
        point::send(&self.group, tag, bytes, to)
    }

    fn receive(&self, tag: Tag, bytes: &mut [u8], from: usize) -> Result<()> {
        point::receive(&self.group, tag, bytes, from)
    }

    fn start_all_gather_f32(&self, tag: Tag, mine: Shared) -> Result<Work> {
        start(&self.group, tag, Kind::Gather, mine)
    }

    fn start_reduce_scatter_sum_f32(&self, tag: Tag, values: Shared) -> Result<Work> {
        start(&self.group, tag, Kind::Scatter, values)
    }

    fn start_all_reduce_sum_f32(&self, tag: Tag, values: Shared) -> Result<Work> {
        start(&self.group, tag, Kind::Reduce, values)
    }

    /// A send is over when MPI says so, which it does only when asked.
    fn settle(&self, tag: Tag, is_free: &dyn Fn() -> bool) -> Result<()> {
        let look = || Ok(if is_free() { Advance::Done } else { Advance::Idle });
        drive(&self.group, tag, look, || self.group.peers().collect())
    }

    fn split(&self, tag: Tag, color: Option<usize>, key: usize) -> Result<Option<Arc<dyn Collective>>> {
        let group = &self.group;
        let call = group.next_call(tag, Operation::Split, 0)?;
        let wish = [u64::from(color.is_some()), color.unwrap_or(0) as u64, key as u64];
        let mut meeting = Meeting::start(group, call, |_| as_bytes(&wish))?;
        complete(group, tag, &mut meeting)?;
        let mut chosen: Vec<(u64, usize)> = Vec::new();
        let of = |rank: usize| if rank == group.rank() { &wish[..] } else { meeting.numbers::<u64>(rank) };
        for rank in 0..group.world() {
            let theirs = of(rank);
            if color.is_some() && theirs[..2] == wish[..2] {
                chosen.push((theirs[2], rank));
            }
        }
        chosen.sort_unstable();
        let ranks: Vec<usize> = chosen.into_iter().map(|(_, rank)| rank).collect();
        // MPI's keys and colours are ints; only order and equality count, so both are numbers that fit.
        let place = ranks.iter().position(|&rank| rank == group.rank());
        let comm = self.split_comm(tag, place.map(|place| (ranks[0], place)))?;
        let (Some(comm), Some(place)) = (comm, place) else { return Ok(None) };
        let topology = group.topology.subset(&ranks);
        let members = ranks.iter().map(|&rank| group.world_rank(rank)).collect();
        let group = Group::new(Arc::clone(group.process()), comm, place, members, topology);
        Ok(Some(Arc::new(Self { group })))
    }

    fn abort(&self, why: &str) {
        self.group.process().abort(why);
    }
}

impl Mpi {
    /// `MPI_Comm_split` blocks, so it runs beside a watch: a rank that dies now must not hang the others. `place` is the
    /// lowest rank of the group, which stands for its colour, and this rank's place in it.
    fn split_comm(&self, tag: Tag, place: Option<(usize, usize)>) -> Result<Option<super::library::Comm>> {
        let comm = self.group.comm();
        let work = move || comm.split(place.map(|(first, _)| first), place.map_or(0, |(_, place)| place));
        let thread = std::thread::Builder::new().name("mpi-split".into()).spawn(work);
        let thread = thread.map_err(|error| Error::Backend {
            rank: self.group.process().rank(),
            library: "threads",
            code: error.raw_os_error().unwrap_or(0).into(),
            text: error.to_string(),
        })?;
        let look = || Ok(if thread.is_finished() { Advance::Done } else { Advance::Idle });
        drive(&self.group, tag, look, || self.group.peers().collect())?;
        let split = thread.join().unwrap_or_else(|_| Err(Error::Launch("splitting a communicator panicked".into())));
        split.map_err(|error| self.group.process().fail(error))
    }
}
