//! The trait that all backends implement.

use std::time::Duration;

use crate::error::Result;
use crate::status::Status;
use crate::tag::Tag;

/// A rank's view of its world. See the crate documentation for the rules that hold for every call.
///
/// Reductions are in place. After an error the contents of a buffer are unspecified and no further call will succeed:
/// the run ends, and resumes from what it has published.
pub trait Collective: Send + Sync {
    /// This rank, `0..world`.
    fn rank(&self) -> usize;

    /// The number of ranks, at least 1.
    fn world(&self) -> usize;

    /// How long a call waits for its peers before it fails.
    fn deadline(&self) -> Duration;

    /// Replaces `values` on every rank by the element-wise sum over the ranks. Lengths must be equal on all ranks.
    ///
    /// The sum is taken along a fixed tree over the ranks, in f32: same bits everywhere, every time.
    ///
    /// # Errors
    /// [`Desync`](crate::Error::Desync), [`Timeout`](crate::Error::Timeout), [`PeerFailed`](crate::Error::PeerFailed).
    fn all_reduce_sum_f32(&self, tag: Tag, values: &mut [f32]) -> Result<()>;

    /// [`Self::all_reduce_sum_f32`] in f64, for counts and statistics.
    ///
    /// # Errors
    /// As [`Self::all_reduce_sum_f32`].
    fn all_reduce_sum_f64(&self, tag: Tag, values: &mut [f64]) -> Result<()>;

    /// Replaces `values` on every rank by the element-wise maximum over the ranks; a NaN anywhere gives NaN.
    ///
    /// # Errors
    /// As [`Self::all_reduce_sum_f32`].
    fn all_reduce_max_f64(&self, tag: Tag, values: &mut [f64]) -> Result<()>;

    /// Replaces `bytes` on every rank by those of rank `root`. Lengths must be equal on all ranks.
    ///
    /// # Errors
    /// As [`Self::all_reduce_sum_f32`], and [`NoSuchRank`](crate::Error::NoSuchRank).
    fn broadcast(&self, tag: Tag, bytes: &mut [u8], root: usize) -> Result<()>;

    /// Returns when all ranks have arrived.
    ///
    /// # Errors
    /// As [`Self::all_reduce_sum_f32`].
    fn barrier(&self, tag: Tag) -> Result<()>;

    /// Tells all ranks the worst status of any. Call it wherever one rank alone might leave the common path.
    ///
    /// # Errors
    /// As [`Self::all_reduce_sum_f32`].
    fn agree(&self, tag: Tag, status: Status) -> Result<Status>;
}
