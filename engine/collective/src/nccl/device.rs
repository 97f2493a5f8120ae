//! Operations on buffers of the GPU.
//!
//! They are put on the communicator's own stream, after whatever the buffers' streams have been given so far, and later
//! work on the buffers waits for them (cudarc's event tracking, which must stay on). The host does not wait:
//! [`Nccl::synchronize`] does, with the deadline, and that is where a missing peer shows.
//!
//! Before each collective the ranks meet on the control communicator, where a rank in another call is named instead of
//! hanging the GPUs. Messages between two ranks are not compared.
//!
//! **Reductions here are NCCL's own.** All ranks get the same bits, and get them again with the same NCCL, GPUs and length,
//! but the order is NCCL's choice, not the tree that [`Collective`](crate::Collective) promises. Its methods keep the promise, on
//! the host.

use cudarc::driver::{DevicePtr, DevicePtrMut, DeviceRepr, ValidAsZeroBits};
use cudarc::nccl::{result, sys};
use half::bf16;

use super::Nccl;
use crate::bytes::Plain;
use crate::call::Operation;
use crate::error::{Result, check_length};
use crate::tag::Tag;

/// A number that NCCL knows.
pub trait Element: Plain + DeviceRepr + ValidAsZeroBits + Default {
    /// NCCL's word for it.
    const KIND: sys::ncclDataType_t;
}

impl Element for f32 {
    const KIND: sys::ncclDataType_t = sys::ncclDataType_t::ncclFloat32;
}

impl Element for bf16 {
    const KIND: sys::ncclDataType_t = sys::ncclDataType_t::ncclBfloat16;
}

impl Element for u8 {
    const KIND: sys::ncclDataType_t = sys::ncclDataType_t::ncclUint8;
}

impl Nccl {
    /// Waits until everything put on this communicator is done.
    ///
    /// # Errors
    /// [`Timeout`](crate::Error::Timeout), in which nobody is named because NCCL does not know;
    /// [`PeerFailed`](crate::Error::PeerFailed), [`Backend`](crate::Error::Backend).
    pub fn synchronize(&self, tag: Tag) -> Result<()> {
        self.channel.wait(tag)
    }

    /// Replaces `values` by their sum over the ranks, in NCCL's order.
    ///
    /// # Errors
    /// As [`Self::all_to_all_device`].
    pub fn all_reduce_sum_device<T: Element>(&self, tag: Tag, values: &mut impl DevicePtrMut<T>) -> Result<()> {
        let count = values.len();
        self.meet(tag, sum::<T>(Operation::AllReduceSumF32, Operation::AllReduceSumBf16), count)?;
        self.count(2 * (self.world - 1) * count.div_ceil(self.world) * size_of::<T>());
        let stream = self.channel.stream();
        let (at, _record) = values.device_ptr_mut(stream);
        self.channel.issue(tag, |comm, stream| {
            // SAFETY: the buffer has `count` numbers, and its events keep it until the stream is done with it.
            unsafe { result::all_reduce(at as _, at as _, count, T::KIND, sys::ncclRedOp_t::ncclSum, comm, stream) }
        })
    }

    /// Writes the sum of everyone's part number `rank` of `values` to `mine`, in NCCL's order.
    ///
    /// # Errors
    /// As [`Self::all_to_all_device`].
    pub fn reduce_scatter_sum_device<T: Element>(
        &self,
        tag: Tag,
        values: &impl DevicePtr<T>,
        mine: &mut impl DevicePtrMut<T>,
    ) -> Result<()> {
        let count = mine.len();
        self.length(tag, "values of a reduce_scatter", count * self.world, values.len())?;
        self.meet(tag, sum::<T>(Operation::ReduceScatterSumF32, Operation::ReduceScatterSumBf16), values.len())?;
        self.count((self.world - 1) * count * size_of::<T>());
        let stream = self.channel.stream();
        let (from, _read) = values.device_ptr(stream);
        let (to, _write) = mine.device_ptr_mut(stream);
        self.channel.issue(tag, |comm, stream| {
            // SAFETY: as in `all_reduce_sum_device`; the lengths were checked.
            unsafe {
                result::reduce_scatter(from as _, to as _, count, T::KIND, sys::ncclRedOp_t::ncclSum, comm, stream)
            }
        })
    }

    /// Everyone's `mine`, in rank order.
    ///
    /// # Errors
    /// As [`Self::all_to_all_device`].
    pub fn all_gather_device<T: Element>(
        &self,
        tag: Tag,
        mine: &impl DevicePtr<T>,
        all: &mut impl DevicePtrMut<T>,
    ) -> Result<()> {
        let count = mine.len();
        self.length(tag, "result of an all_gather", count * self.world, all.len())?;
        self.meet(tag, Operation::AllGather, count * size_of::<T>())?;
        self.count((self.world - 1) * count * size_of::<T>());
        let stream = self.channel.stream();
        let (from, _read) = mine.device_ptr(stream);
        let (to, _write) = all.device_ptr_mut(stream);
        self.channel.issue(tag, |comm, stream| {
            // SAFETY: as in `all_reduce_sum_device`; the lengths were checked.
            unsafe { result::all_gather(from as _, to as _, count, T::KIND, comm, stream) }
        })
    }

    /// Replaces `values` by those of rank `root`.
    ///
    /// # Errors
    /// As [`Self::all_to_all_device`], and [`NoSuchRank`](crate::Error::NoSuchRank).
    pub fn broadcast_device<T: Element>(&self, tag: Tag, values: &mut impl DevicePtrMut<T>, root: usize) -> Result<()> {
        self.check_rank(tag, root)?;
        let count = values.len();
        self.meet(tag, Operation::Broadcast { root }, count * size_of::<T>())?;
        // One hop of the ring: what each rank but one sends, and each but one gets.
        self.count_each(
            if (self.rank + 1) % self.world == root { 0 } else { count * size_of::<T>() },
            if self.rank == root { 0 } else { count * size_of::<T>() },
        );
        let stream = self.channel.stream();
        let (at, _record) = values.device_ptr_mut(stream);
        self.channel.issue(tag, |comm, stream| {
            // SAFETY: as in `all_reduce_sum_device`.
            unsafe { result::broadcast(at as _, at as _, count, T::KIND, root as i32, comm, stream) }
        })
    }

    /// Part number r of `send` to rank r, of equal parts.
    ///
    /// # Errors
    /// A peer in another call, or missing at the start of this one, as any call of the control communicator;
    /// [`WrongLength`](crate::Error::WrongLength); [`Backend`](crate::Error::Backend).
    pub fn all_to_all_device<T: Element>(
        &self,
        tag: Tag,
        send: &impl DevicePtr<T>,
        receive: &mut impl DevicePtrMut<T>,
    ) -> Result<()> {
        let (world, length) = (self.world, send.len());
        self.length(tag, "numbers of an all_to_all", length.next_multiple_of(world), length)?;
        self.length(tag, "result of an all_to_all", length, receive.len())?;
        self.meet(tag, Operation::AllToAll, length * size_of::<T>())?;
        let count = length / world;
        let step = (count * size_of::<T>()) as u64;
        self.count((world - 1) * count * size_of::<T>());
        let stream = self.channel.stream();
        let (from, _read) = send.device_ptr(stream);
        let (to, _write) = receive.device_ptr_mut(stream);
        self.channel.issue(tag, |comm, stream| {
            grouped(|| {
                for peer in 0..world {
                    let at = peer as u64 * step;
                    // SAFETY: part number `peer` lies within both buffers.
                    unsafe {
                        result::send((from + at) as _, count, T::KIND, peer as i32, comm, stream)?;
                        result::recv((to + at) as _, count, T::KIND, peer as i32, comm, stream)?;
                    }
                }
                Ok(())
            })
        })
    }

    /// Sends `values` to rank `to`, which must [receive](Self::receive_device) as many: neither goes on alone.
    ///
    /// # Errors
    /// [`NoSuchRank`](crate::Error::NoSuchRank), [`Backend`](crate::Error::Backend).
    pub fn send_device<T: Element>(&self, tag: Tag, values: &impl DevicePtr<T>, to: usize) -> Result<()> {
        self.check_rank(tag, to)?;
        self.count_call();
        self.count_each(values.len() * size_of::<T>(), 0);
        let count = values.len();
        let (from, _read) = values.device_ptr(self.channel.stream());
        self.channel.issue(tag, |comm, stream| {
            // SAFETY: as in `all_reduce_sum_device`.
            unsafe { result::send(from as _, count, T::KIND, to as i32, comm, stream) }
        })
    }

    /// Receives `values` from rank `from`.
    ///
    /// # Errors
    /// As [`Self::send_device`].
    pub fn receive_device<T: Element>(&self, tag: Tag, values: &mut impl DevicePtrMut<T>, from: usize) -> Result<()> {
        self.check_rank(tag, from)?;
        self.count_call();
        self.count_each(0, values.len() * size_of::<T>());
        let count = values.len();
        let (to, _write) = values.device_ptr_mut(self.channel.stream());
        self.channel.issue(tag, |comm, stream| {
            // SAFETY: as in `all_reduce_sum_device`.
            unsafe { result::recv(to as _, count, T::KIND, from as i32, comm, stream) }
        })
    }

    fn length(&self, tag: Tag, what: &'static str, expected: usize, got: usize) -> Result<()> {
        check_length(self.channel.fate().rank, tag, what, expected, got)
    }
}

/// The name of a sum of `T`.
fn sum<T: Element>(f32s: Operation, bf16s: Operation) -> Operation {
    if T::KIND == sys::ncclDataType_t::ncclBfloat16 { bf16s } else { f32s }
}

/// Makes several calls one, so that none waits for another.
fn grouped(
    calls: impl FnOnce() -> std::result::Result<(), result::NcclError>,
) -> std::result::Result<result::NcclStatus, result::NcclError> {
    result::group_start()?;
    let made = calls();
    // A group that was started is ended, whatever happened in it.
    let ended = result::group_end();
    made.and(ended)
}
