//! How ranks can fail each other.

use std::time::Duration;

use crate::tag::Tag;

/// Result of a collective call.
pub type Result<T> = std::result::Result<T, Error>;

/// A collective call did not take place.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The ranks are not in the same call: their programs, configurations or data differ.
    #[error("rank {rank} called {called} while rank {peer} called {peer_called}; all ranks must run the same plan")]
    Desync {
        /// This rank.
        rank: usize,
        /// Its call.
        called: Tag,
        /// The other rank.
        peer: usize,
        /// The call of the other rank.
        peer_called: Tag,
    },
    /// A peer did not arrive in time.
    #[error("rank {rank}: {tag} did not complete within {} s; not arrived: {missing:?}", deadline.as_secs_f32())]
    Timeout {
        /// This rank.
        rank: usize,
        /// The call.
        tag: Tag,
        /// The deadline that has passed.
        deadline: Duration,
        /// The ranks that did not arrive.
        missing: Vec<usize>,
    },
    /// A peer has left the world.
    #[error("rank {rank}: rank {peer} failed: {why}")]
    PeerFailed {
        /// This rank.
        rank: usize,
        /// The rank that failed.
        peer: usize,
        /// What it said, or how it was noticed.
        why: String,
    },
    /// A rank that does not exist was named.
    #[error("{tag}: rank {root} does not exist in a world of {world}")]
    NoSuchRank {
        /// The call.
        tag: Tag,
        /// The rank that was named.
        root: usize,
        /// The number of ranks.
        world: usize,
    },
}
