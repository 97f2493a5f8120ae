//! The trait that all backends implement.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use half::bf16;

use crate::bytes::{as_bytes, as_bytes_mut};
use crate::call::{Backend, Traffic};
use crate::error::Result;
use crate::status::Status;
use crate::tag::Tag;
use crate::topology::Topology;
use crate::work::{Shared, Work};

/// A rank's view of its world, or of a group of it. See the crate documentation for the rules that hold for every call.
///
/// All reductions sum along the fixed tree of [`tree_sum`](crate::tree_sum): same bits on every rank, every time.
///
/// Every call may fail with [`Desync`](crate::Error::Desync), [`OperationMismatch`](crate::Error::OperationMismatch),
/// [`LengthMismatch`](crate::Error::LengthMismatch), [`Timeout`](crate::Error::Timeout) and
/// [`PeerFailed`](crate::Error::PeerFailed). After such an error the contents of a buffer are unspecified and no further
/// call on this world or any group of it will succeed: the run ends, and resumes from what it has published.
/// [`WrongLength`](crate::Error::WrongLength) and [`NoSuchRank`](crate::Error::NoSuchRank) are found before anything is
/// sent; the peers learn of them only if this rank then calls [`Self::abort`].
pub trait Collective: Send + Sync + fmt::Debug {
    /// This rank, `0..world`.
    fn rank(&self) -> usize;

    /// The number of ranks, at least 1.
    fn world(&self) -> usize;

    /// How long a call waits for its peers before it fails.
    fn deadline(&self) -> Duration;

    /// What carries the bytes.
    fn backend(&self) -> Backend;

    /// Which ranks of this communicator share a machine.
    fn topology(&self) -> &Topology;

    /// What this rank has exchanged on this communicator so far (not on groups split from it).
    fn traffic(&self) -> Traffic;

    /// Replaces `values` on every rank by the element-wise sum over the ranks. Lengths must be equal on all ranks.
    ///
    /// # Errors
    /// See [`Collective`].
    fn all_reduce_sum_f32(&self, tag: Tag, values: &mut [f32]) -> Result<()>;

    /// [`Self::all_reduce_sum_f32`] in f64, for counts and statistics.
    ///
    /// # Errors
    /// See [`Collective`].
    fn all_reduce_sum_f64(&self, tag: Tag, values: &mut [f64]) -> Result<()>;

    /// Replaces `values` on every rank by the element-wise maximum over the ranks; a NaN anywhere gives NaN.
    ///
    /// # Errors
    /// See [`Collective`].
    fn all_reduce_max_f64(&self, tag: Tag, values: &mut [f64]) -> Result<()>;

    /// [`Self::all_reduce_sum_f32`] of bf16: the tree is summed in f32 and rounded once, to nearest, ties to even.
    ///
    /// # Errors
    /// See [`Collective`].
    fn all_reduce_sum_bf16(&self, tag: Tag, values: &mut [bf16]) -> Result<()>;

    /// `values` is `world` equal parts; `mine` becomes the sum over the ranks of everyone's part number `rank`.
    /// `values.len() == world * mine.len()`, equal on all ranks.
    ///
    /// # Errors
    /// See [`Collective`].
    fn reduce_scatter_sum_f32(&self, tag: Tag, values: &[f32], mine: &mut [f32]) -> Result<()>;

    /// [`Self::reduce_scatter_sum_f32`] of bf16, summed in f32 and rounded once.
    ///
    /// # Errors
    /// See [`Collective`].
    fn reduce_scatter_sum_bf16(&self, tag: Tag, values: &[bf16], mine: &mut [bf16]) -> Result<()>;

    /// Writes the `mine` of all ranks to `all`, in rank order. `all.len() == world * mine.len()`, equal on all ranks.
    ///
    /// # Errors
    /// See [`Collective`].
    fn all_gather(&self, tag: Tag, mine: &[u8], all: &mut [u8]) -> Result<()>;

    /// [`Self::all_gather`] of f32.
    ///
    /// # Errors
    /// See [`Collective`].
    fn all_gather_f32(&self, tag: Tag, mine: &[f32], all: &mut [f32]) -> Result<()> {
        self.all_gather(tag, as_bytes(mine), as_bytes_mut(all))
    }

    /// The `mine` of all ranks, in rank order. Any length on any rank.
    ///
    /// # Errors
    /// See [`Collective`].
    fn all_gather_varied(&self, tag: Tag, mine: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// `send` is `world` equal chunks; chunk `j` of rank `i` becomes chunk `i` of `receive` on rank `j`. Lengths are equal,
    /// on all ranks too, and a multiple of the world.
    ///
    /// # Errors
    /// See [`Collective`].
    fn all_to_all(&self, tag: Tag, send: &[u8], receive: &mut [u8]) -> Result<()>;

    /// Replaces `bytes` on every rank by those of rank `root`. Lengths must be equal on all ranks.
    ///
    /// # Errors
    /// See [`Collective`].
    fn broadcast(&self, tag: Tag, bytes: &mut [u8], root: usize) -> Result<()>;

    /// Returns when all ranks have arrived.
    ///
    /// # Errors
    /// See [`Collective`].
    fn barrier(&self, tag: Tag) -> Result<()>;

    /// Tells all ranks the worst status of any. Call it wherever one rank alone might leave the common path.
    ///
    /// # Errors
    /// See [`Collective`].
    fn agree(&self, tag: Tag, status: Status) -> Result<Status>;

    /// Sends `bytes` to rank `to` and returns at once. Messages between one pair of ranks arrive in order.
    ///
    /// # Errors
    /// See [`Collective`].
    fn send(&self, tag: Tag, bytes: Vec<u8>, to: usize) -> Result<()>;

    /// Takes the next message of rank `from`, which must have this `tag` and the length of `bytes`.
    ///
    /// # Errors
    /// See [`Collective`].
    fn receive(&self, tag: Tag, bytes: &mut [u8], from: usize) -> Result<()>;

    /// Starts an [`Self::all_gather_f32`]. All ranks start operations in the same order and may wait in any.
    ///
    /// # Errors
    /// See [`Collective`].
    fn start_all_gather_f32(&self, tag: Tag, mine: Shared) -> Result<Work>;

    /// Starts a [`Self::reduce_scatter_sum_f32`]; the length of `values` must be a multiple of the world.
    ///
    /// # Errors
    /// See [`Collective`].
    fn start_reduce_scatter_sum_f32(&self, tag: Tag, values: Shared) -> Result<Work>;

    /// Starts an [`Self::all_reduce_sum_f32`].
    ///
    /// # Errors
    /// See [`Collective`].
    fn start_all_reduce_sum_f32(&self, tag: Tag, values: Shared) -> Result<Work>;

    /// Waits until `is_free` says that this rank has back what it lent to started operations. Every rank has waited for these
    /// by now, so the peers have read it; but a backend may have to be asked before it notices. Where it notices by itself
    /// this returns at once.
    ///
    /// # Errors
    /// See [`Collective`].
    fn settle(&self, tag: Tag, is_free: &dyn Fn() -> bool) -> Result<()> {
        let _ = (tag, is_free);
        Ok(())
    }

    /// Forms groups: ranks of equal `color` become one communicator, ordered by `(key, rank)`. A rank of color `None` takes
    /// part in the call and gets none.
    ///
    /// # Errors
    /// See [`Collective`].
    fn split(&self, tag: Tag, color: Option<usize>, key: usize) -> Result<Option<Arc<dyn Collective>>>;

    /// This rank cannot go on: wakes every peer, on this world and all groups of it, with
    /// [`PeerFailed`](crate::Error::PeerFailed) saying `why`. May be called several times; the first cause stays.
    fn abort(&self, why: &str);
}
