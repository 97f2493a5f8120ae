//! Ranks: one trait, many backends.
//!
//! A training run is `world` ranks that execute the same program on different data. Whatever crosses from one rank to
//! another goes through [`Collective`]. [`Solo`] is a world of one, which needs no threads, no launcher and no copies;
//! backends with several ranks fit behind the same trait without a change to its callers.
//!
//! Rules that every backend keeps, and that callers may rely on:
//!
//! * **Same order everywhere.** All ranks make the same calls in the same order. Each call carries a [`Tag`]; a backend
//!   that sees two ranks in different calls answers [`Error::Desync`] instead of mixing their numbers.
//! * **Fixed reduction tree.** A reduction gives the same bits on all ranks and from run to run.
//! * **No hang.** Every call has a deadline; a missing peer is [`Error::Timeout`], naming it.
//! * **One way for an error to cross.** [`Collective::agree`]: all ranks learn the worst [`Status`] of any.
//!   [`Collective::abort`] is for a rank that cannot even do that.
//!
//! [`Threads`] is always there. Ranks as processes (module `mpi`) need the cargo feature `mpi`, ranks as GPUs (module `nccl`)
//! the feature `cuda`; [`launch`] finds out how a process was started and connects it.
//!
//! This crate knows buffers and ranks; it knows nothing of tensors, models or files.

mod bytes;
mod call;
mod collective;
pub mod compress;
mod error;
mod exact;
mod guard;
mod hierarchy;
pub mod launch;
#[cfg(feature = "mpi")]
pub mod mpi;
#[cfg(feature = "cuda")]
pub mod nccl;
mod solo;
mod status;
pub mod suite;
mod tag;
mod threads;
mod topology;
mod tree;
mod work;

pub use bytes::{Plain, as_bytes, as_bytes_mut};
pub use call::{Backend, Operation, Traffic};
pub use collective::Collective;
pub use error::{Error, Result, check_length};
pub use exact::{ExactSum, all_reduce_exact};
pub use guard::AbortOnPanic;
pub use hierarchy::Hierarchical;
pub use solo::Solo;
pub use status::Status;
pub use tag::Tag;
pub use threads::Threads;
pub use topology::Topology;
pub use tree::{max_f64, tree_max_f64, tree_sum, tree_sum_bf16, tree_sum_f64};
pub use work::{Pending, Shared, Work};
