//! Operations under way.

use std::fmt;
use std::sync::Arc;

use crate::error::Result;

/// Values that stay readable, unchanged, until every peer has read them (a clone of the `Arc` is kept until then).
///
/// An `Arc<Vec<f32>>` is one. `as_ref` must return the same values every time.
pub type Shared = Arc<dyn AsRef<[f32]> + Send + Sync>;

/// What a backend does to complete a non-blocking operation.
pub trait Pending: Send {
    /// See [`Work::is_ready`].
    ///
    /// # Errors
    /// As [`Work::is_ready`].
    fn is_ready(&mut self) -> Result<bool>;

    /// See [`Work::wait_into`].
    ///
    /// # Errors
    /// As [`Work::wait_into`].
    fn wait_into(self: Box<Self>, out: &mut [f32]) -> Result<()>;
}

/// An operation under way. Dropping it before it is done is allowed: that neither blocks nor panics, and peers still get
/// what this rank has brought.
#[must_use = "the result is only written by wait_into"]
pub struct Work(Box<dyn Pending>);

impl Work {
    /// An operation that `pending` completes. For backends.
    pub fn new(pending: impl Pending + 'static) -> Self {
        Self(Box::new(pending))
    }

    /// True if [`Self::wait_into`] would not have to wait for a peer. Never blocks on one.
    ///
    /// # Errors
    /// If the world has failed.
    pub fn is_ready(&mut self) -> Result<bool> {
        self.0.is_ready()
    }

    /// Blocks up to the deadline, then writes the result to `out`: an all_gather `world * n` values, a reduce_scatter
    /// `n / world`, an all_reduce `n`, where every rank brought `n`.
    ///
    /// # Errors
    /// As any call; [`WrongLength`](crate::Error::WrongLength) if `out` does not fit.
    pub fn wait_into(self, out: &mut [f32]) -> Result<()> {
        self.0.wait_into(out)
    }
}

impl fmt::Debug for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Work")
    }
}
