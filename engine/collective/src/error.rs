//! How ranks can fail each other.

use std::time::Duration;

use crate::call::Operation;
use crate::tag::Tag;

/// Result of a collective call.
pub type Result<T> = std::result::Result<T, Error>;

/// A collective call did not take place.
///
/// Ranks in these errors are ranks of the world, also for calls on a group: they name processes, which is what whoever
/// reads the message has to look at. [`Error::NoSuchRank`] alone speaks of the ranks of the communicator it was called on.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The ranks are not in the same call: their programs, configurations or data differ.
    #[error("rank {rank} called {called} while rank {peer} called {peer_called}; all ranks must run the same plan")]
    Desync {
        /// The rank that noticed: this one, unless this one learned of it from others.
        rank: usize,
        /// Its call.
        called: Tag,
        /// The other rank.
        peer: usize,
        /// The call of the other rank.
        peer_called: Tag,
    },
    /// The ranks came to the same place with different operations.
    #[error(
        "{tag}: rank {rank} called {operation} while rank {peer} called {peer_operation}; all ranks must run the same plan"
    )]
    OperationMismatch {
        /// The call.
        tag: Tag,
        /// The rank that noticed.
        rank: usize,
        /// What it wants to do.
        operation: Operation,
        /// The other rank.
        peer: usize,
        /// What the other rank wants to do.
        peer_operation: Operation,
    },
    /// The ranks are in the same call with buffers that do not fit together.
    #[error("{tag}: rank {rank} brought {length} elements while rank {peer} brought {peer_length}; they must be equal")]
    LengthMismatch {
        /// The call.
        tag: Tag,
        /// The rank that noticed.
        rank: usize,
        /// The length of its buffer, in elements (in bytes for byte buffers).
        length: usize,
        /// The other rank.
        peer: usize,
        /// The length of the other's buffer.
        peer_length: usize,
    },
    /// A buffer of this rank does not have the length that the call itself asks for. Nothing was sent.
    #[error("{tag}: rank {rank}: {what} has {got} elements where {expected} are needed")]
    WrongLength {
        /// The call.
        tag: Tag,
        /// This rank.
        rank: usize,
        /// Which buffer.
        what: &'static str,
        /// The length it must have.
        expected: usize,
        /// The length it has.
        got: usize,
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
    /// The library under a backend refused.
    #[error("rank {rank}: {library} answered {code}: {text}")]
    Backend {
        /// This rank.
        rank: usize,
        /// The library, for example `"MPI"`.
        library: &'static str,
        /// Its error code.
        code: i64,
        /// Its words.
        text: String,
    },
    /// The ranks could not be brought together.
    #[error("launch: {0}")]
    Launch(String),
}

impl Error {
    /// True if ranks that run different plans met: another tag, operation or length.
    pub fn is_desync(&self) -> bool {
        matches!(self, Self::Desync { .. } | Self::OperationMismatch { .. } | Self::LengthMismatch { .. })
    }
}

/// Fails with [`Error::WrongLength`] unless `got == expected`. For backends.
///
/// # Errors
/// [`Error::WrongLength`].
pub fn check_length(rank: usize, tag: Tag, what: &'static str, expected: usize, got: usize) -> Result<()> {
    if got == expected { Ok(()) } else { Err(Error::WrongLength { tag, rank, what, expected, got }) }
}
