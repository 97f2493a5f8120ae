//! Ranks: one trait, many backends.
//!
//! A training run is `world` ranks that execute the same program on different data. Whatever crosses from one rank to
//! another goes through [`Collective`]. There is one backend so far, [`Solo`]: a world of one, which needs no threads, no
//! launcher and no copies. Backends with several ranks fit behind the same trait without a change to its callers.
//!
//! Rules that every backend keeps, and that callers may rely on:
//!
//! * **Same order everywhere.** All ranks make the same calls in the same order. Each call carries a [`Tag`]; a backend
//!   that sees two ranks in different calls answers [`Error::Desync`] instead of mixing their numbers.
//! * **Fixed reduction tree.** A reduction gives the same bits on all ranks and from run to run.
//! * **No hang.** Every call has a deadline; a missing peer is [`Error::Timeout`], naming it.
//! * **One way for an error to cross.** [`Collective::agree`]: all ranks learn the worst [`Status`] of any.
//!
//! This crate knows buffers and ranks; it knows nothing of tensors, models or files.

mod collective;
mod error;
mod solo;
mod status;
mod tag;

pub use collective::Collective;
pub use error::{Error, Result};
pub use solo::Solo;
pub use status::Status;
pub use tag::Tag;
