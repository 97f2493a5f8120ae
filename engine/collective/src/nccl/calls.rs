//! The trait, on host buffers.
//!
//! Large buffers go through the GPU; small ones, f64 and messages stay on the control communicator, which is exact and, for
//! them, faster. Operations under way do, too: a host that wants to overlap uses the `*_device` methods.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use half::bf16;

use super::Nccl;
use super::device::Element;
use crate::call::{Backend, Operation, Traffic};
use crate::collective::Collective;
use crate::error::{Result, check_length};
use crate::status::Status;
use crate::tag::Tag;
use crate::topology::Topology;
use crate::tree::{Reduction, SumBf16, SumF32, reduce_blocks};
use crate::work::{Shared, Work};

/// Below this a detour through the GPU cannot pay: two copies over its bus and a launch.
const STAGED_BYTES: usize = 256 << 10;

const OPERATIONS: [Operation; 6] = [
    Operation::AllReduceSumF32,
    Operation::AllReduceSumBf16,
    Operation::ReduceScatterSumF32,
    Operation::ReduceScatterSumBf16,
    Operation::AllGather,
    Operation::AllToAll,
];

/// A number for an operation that ranks meet for.
pub(super) fn code(operation: Operation) -> u64 {
    match operation {
        Operation::Broadcast { root } => 1000 + root as u64,
        other => OPERATIONS.iter().position(|known| *known == other).unwrap_or(OPERATIONS.len()) as u64,
    }
}

/// The operation of a [`code`].
pub(super) fn operation(code: u64) -> Option<Operation> {
    match code.checked_sub(1000) {
        Some(root) => Some(Operation::Broadcast { root: root as usize }),
        None => OPERATIONS.get(code as usize).copied(),
    }
}

fn is_small<T>(values: &[T]) -> bool {
    size_of_val(values) < STAGED_BYTES
}

impl Nccl {
    /// Copies to the GPU; what is missing to `length` is zero.
    fn upload<T: Element>(&self, values: &[T], length: usize) -> Result<cudarc::driver::CudaSlice<T>> {
        let stream = self.stream();
        let mut buffer = stream.alloc_zeros(length).map_err(|error| self.channel.cuda_error(error))?;
        stream.memcpy_htod(values, &mut buffer).map_err(|error| self.channel.cuda_error(error))?;
        Ok(buffer)
    }

    /// Copies from the GPU, when everything before is done: the copy itself has no deadline.
    fn download<T: Element>(&self, tag: Tag, buffer: &cudarc::driver::CudaSlice<T>, values: &mut [T]) -> Result<()> {
        self.synchronize(tag)?;
        let part = buffer.slice(..values.len());
        self.stream().memcpy_dtoh(&part, values).map_err(|error| self.channel.cuda_error(error))
    }

    /// Everyone's part number `rank` of `values`, side by side, then reduced along the tree.
    fn reduced_part<R: Reduction>(&self, tag: Tag, values: &[R::Item], mine: &mut [R::Item]) -> Result<()>
    where
        R::Item: Element,
    {
        let length = mine.len() * self.world;
        let send = self.upload(values, length)?;
        let mut receive = self.upload(&[], length)?;
        self.all_to_all_device(tag, &send, &mut receive)?;
        let mut parts = vec![R::Item::default(); length];
        self.download(tag, &receive, &mut parts)?;
        let part = mine.len();
        reduce_blocks::<R>(
            self.world,
            part,
            |rank, range| &parts[rank * part + range.start..rank * part + range.end],
            |range, block| mine[range].copy_from_slice(block),
        );
        Ok(())
    }

    fn all_reduce_staged<R: Reduction>(&self, tag: Tag, values: &mut [R::Item]) -> Result<()>
    where
        R::Item: Element,
    {
        let part = values.len().div_ceil(self.world);
        let mut mine = vec![R::Item::default(); part];
        self.reduced_part::<R>(tag, values, &mut mine)?;
        let mine = self.upload(&mine, part)?;
        let mut all = self.upload(&[], part * self.world)?;
        self.all_gather_device(tag, &mine, &mut all)?;
        self.download(tag, &all, values)
    }

    fn scatter_length(&self, tag: Tag, mine: usize, values: usize) -> Result<()> {
        check_length(self.channel.fate().rank, tag, "values of a reduce_scatter", mine * self.world, values)
    }
}

impl Collective for Nccl {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.world
    }

    fn deadline(&self) -> Duration {
        self.channel.fate().deadline
    }

    fn backend(&self) -> Backend {
        Backend::Nccl
    }

    fn topology(&self) -> &Topology {
        self.control.topology()
    }

    fn traffic(&self) -> Traffic {
        let control = self.control.traffic();
        Traffic {
            sent_bytes: control.sent_bytes + self.sent.load(Ordering::Relaxed),
            received_bytes: control.received_bytes + self.received.load(Ordering::Relaxed),
            calls: control.calls + self.calls.load(Ordering::Relaxed),
        }
    }

    fn all_reduce_sum_f32(&self, tag: Tag, values: &mut [f32]) -> Result<()> {
        if is_small(values) {
            return self.control.all_reduce_sum_f32(tag, values);
        }
        self.all_reduce_staged::<SumF32>(tag, values)
    }

    fn all_reduce_sum_f64(&self, tag: Tag, values: &mut [f64]) -> Result<()> {
        self.control.all_reduce_sum_f64(tag, values)
    }

    fn all_reduce_max_f64(&self, tag: Tag, values: &mut [f64]) -> Result<()> {
        self.control.all_reduce_max_f64(tag, values)
    }

    fn all_reduce_sum_bf16(&self, tag: Tag, values: &mut [bf16]) -> Result<()> {
        if is_small(values) {
            return self.control.all_reduce_sum_bf16(tag, values);
        }
        self.all_reduce_staged::<SumBf16>(tag, values)
    }

    fn reduce_scatter_sum_f32(&self, tag: Tag, values: &[f32], mine: &mut [f32]) -> Result<()> {
        self.scatter_length(tag, mine.len(), values.len())?;
        if is_small(values) {
            return self.control.reduce_scatter_sum_f32(tag, values, mine);
        }
        self.reduced_part::<SumF32>(tag, values, mine)
    }

    fn reduce_scatter_sum_bf16(&self, tag: Tag, values: &[bf16], mine: &mut [bf16]) -> Result<()> {
        self.scatter_length(tag, mine.len(), values.len())?;
        if is_small(values) {
            return self.control.reduce_scatter_sum_bf16(tag, values, mine);
        }
        self.reduced_part::<SumBf16>(tag, values, mine)
    }

    fn all_gather(&self, tag: Tag, mine: &[u8], all: &mut [u8]) -> Result<()> {
        if is_small(mine) {
            return self.control.all_gather(tag, mine, all);
        }
        check_length(self.channel.fate().rank, tag, "result of an all_gather", mine.len() * self.world, all.len())?;
        let mine = self.upload(mine, mine.len())?;
        let mut gathered = self.upload(&[], all.len())?;
        self.all_gather_device(tag, &mine, &mut gathered)?;
        self.download(tag, &gathered, all)
    }

    fn all_gather_varied(&self, tag: Tag, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.control.all_gather_varied(tag, mine)
    }

    fn all_to_all(&self, tag: Tag, send: &[u8], receive: &mut [u8]) -> Result<()> {
        if is_small(send) {
            return self.control.all_to_all(tag, send, receive);
        }
        check_length(self.channel.fate().rank, tag, "result of an all_to_all", send.len(), receive.len())?;
        let send = self.upload(send, send.len())?;
        let mut received = self.upload(&[], receive.len())?;
        self.all_to_all_device(tag, &send, &mut received)?;
        self.download(tag, &received, receive)
    }

    fn broadcast(&self, tag: Tag, bytes: &mut [u8], root: usize) -> Result<()> {
        self.check_rank(tag, root)?;
        if is_small(bytes) {
            return self.control.broadcast(tag, bytes, root);
        }
        let mut buffer = self.upload(bytes, bytes.len())?;
        self.broadcast_device(tag, &mut buffer, root)?;
        self.download(tag, &buffer, bytes)
    }

    fn barrier(&self, tag: Tag) -> Result<()> {
        self.control.barrier(tag)
    }

    fn agree(&self, tag: Tag, status: Status) -> Result<Status> {
        self.control.agree(tag, status)
    }

    fn send(&self, tag: Tag, bytes: Vec<u8>, to: usize) -> Result<()> {
        self.control.send(tag, bytes, to)
    }

    fn receive(&self, tag: Tag, bytes: &mut [u8], from: usize) -> Result<()> {
        self.control.receive(tag, bytes, from)
    }

    fn start_all_gather_f32(&self, tag: Tag, mine: Shared) -> Result<Work> {
        self.control.start_all_gather_f32(tag, mine)
    }

    fn start_reduce_scatter_sum_f32(&self, tag: Tag, values: Shared) -> Result<Work> {
        self.control.start_reduce_scatter_sum_f32(tag, values)
    }

    fn start_all_reduce_sum_f32(&self, tag: Tag, values: Shared) -> Result<Work> {
        self.control.start_all_reduce_sum_f32(tag, values)
    }

    fn split(&self, tag: Tag, color: Option<usize>, key: usize) -> Result<Option<Arc<dyn Collective>>> {
        // The control communicator orders the group; its ranks are NCCL's keys, so that both agree.
        let control = self.control.split(tag, color, key)?;
        let key = control.as_ref().map_or(0, |control| control.rank());
        let channel = self.channel.split(tag, color, key)?;
        let (Some(control), Some(channel)) = (control, channel) else { return Ok(None) };
        Ok(Some(Arc::new(Self::new(control, channel)?)))
    }

    fn abort(&self, why: &str) {
        self.control.abort(why);
        self.channel.end();
    }
}
