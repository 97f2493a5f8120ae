//! What can end a stage, and the exit code that says so.

use std::fmt;

use tandem_collective::Error as CollectiveError;
use tandem_data::DataError;
use tandem_engine::Error as EngineError;
use tandem_store::StoreError;

use crate::config::ConfigError;
use crate::ranks::RankFailures;

/// Result of a stage.
pub type Result<T, E = StageError> = std::result::Result<T, E>;

/// A stage could not go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StageError {
    /// The configuration or the command line cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The data cannot be used.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The data, model or tokenizer is not the one that this run began with.
    #[error(
        "{what} has changed since this run began: its digest was {before} and is {now}; restore it, use another \
         --output-dir, or pass --resume never to start over"
    )]
    InputChanged {
        /// What has changed.
        what: String,
        /// Its digest when the run began.
        before: String,
        /// Its digest now.
        now: String,
    },
    /// A rank does not see the data, model or tokenizer that the leader sees.
    #[error(
        "rank {rank}: {what} is not that of rank {leader}: its digest is {here}, there it is {there}; give all ranks the \
         same files"
    )]
    InputDiffers {
        /// What differs.
        what: String,
        /// This rank.
        rank: usize,
        /// The rank it is compared with.
        leader: usize,
        /// Its digest here.
        here: String,
        /// Its digest at the leader.
        there: String,
    },
    /// A reward could not be computed.
    #[error("reward: {0}")]
    Reward(String),
    /// Training has left the numbers in which it makes sense to go on.
    #[error(
        "{0}; the last good checkpoint is kept. Lower the learning rate or look at the rows named in metrics.jsonl"
    )]
    Numerical(String),
    /// The engine refused.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Another rank failed.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// Something could not be read from or written to the run directory.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// One or more of several ranks failed.
    #[error("{0}")]
    Ranks(RankFailures),
    /// A fault of this program.
    #[error("internal error: {0}; please report it with the command line and the configuration")]
    Bug(String),
}

/// What a process says by its exit status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    /// All is done.
    Done = 0,
    /// The configuration or the command line cannot be used.
    Config = 2,
    /// The data or a model cannot be used.
    Data = 3,
    /// Training was halted because its numbers went wrong.
    Numerical = 4,
    /// Ranks lost each other; starting again may help.
    Communication = 5,
    /// The run directory belongs to another process.
    Locked = 6,
    /// A checkpoint could not be written, or none can be read.
    Storage = 7,
    /// A fault of this program.
    Bug = 70,
    /// Stopped on request with its state saved; start it again to continue.
    Preempted = 75,
}

impl StageError {
    /// The exit status for this error.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            StageError::Config(_) => ExitCode::Config,
            StageError::Data(_)
            | StageError::InputChanged { .. }
            | StageError::InputDiffers { .. }
            | StageError::Reward(_) => ExitCode::Data,
            StageError::Numerical(_) => ExitCode::Numerical,
            StageError::Engine(error) => engine_code(error),
            // Ranks that cannot be brought together were started in a wrong way.
            StageError::Collective(CollectiveError::Launch(_)) => ExitCode::Config,
            StageError::Collective(_) => ExitCode::Communication,
            StageError::Store(error) => store_code(error),
            StageError::Ranks(failures) => failures.exit_code(),
            StageError::Bug(_) => ExitCode::Bug,
        }
    }

    /// Whether the disk alone is at fault, so that a run may go on and try again at its next checkpoint.
    pub fn is_retryable(&self) -> bool {
        match self {
            StageError::Store(error) | StageError::Engine(EngineError::Store(error)) => error.is_retryable(),
            _ => false,
        }
    }

    /// Whether this rank has only left because another one failed.
    pub fn is_echo(&self) -> bool {
        matches!(
            self,
            StageError::Collective(CollectiveError::PeerFailed { .. })
                | StageError::Engine(EngineError::Collective(CollectiveError::PeerFailed { .. }))
        )
    }

    /// A [`StageError::Bug`] from whatever should not have happened.
    pub fn bug(error: impl fmt::Display) -> Self {
        StageError::Bug(error.to_string())
    }
}

impl From<tandem_kernels::Error> for StageError {
    fn from(error: tandem_kernels::Error) -> Self {
        StageError::Engine(error.into())
    }
}

impl From<candle_core::Error> for StageError {
    fn from(error: candle_core::Error) -> Self {
        StageError::Engine(error.into())
    }
}

fn store_code(error: &StoreError) -> ExitCode {
    match error {
        StoreError::Locked { .. } => ExitCode::Locked,
        _ => ExitCode::Storage,
    }
}

fn engine_code(error: &EngineError) -> ExitCode {
    match error {
        EngineError::Store(error) => store_code(error),
        EngineError::Collective(_) => ExitCode::Communication,
        EngineError::Mesh(_) => ExitCode::Config,
        EngineError::Checkpoint { .. } => ExitCode::Storage,
        EngineError::NotFinite { .. } => ExitCode::Numerical,
        EngineError::Io { .. }
        | EngineError::ModelFile { .. }
        | EngineError::Tensors { .. }
        | EngineError::SequenceLength { .. } => ExitCode::Data,
        _ => ExitCode::Bug,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_the_documented_ones() {
        let locked = || StoreError::Locked { dir: "x".into(), owner: "y".into() };
        let override_ = ConfigError::Override { argument: "a".into(), problem: "b".into() };
        for (error, code) in [
            (StageError::from(override_), 2),
            (StageError::Reward("x".into()), 3),
            (StageError::Numerical("x".into()), 4),
            (locked().into(), 6),
            (EngineError::from(locked()).into(), 6),
            (StoreError::KeepTooFew { keep_last: 1 }.into(), 7),
            (StageError::bug("x"), 70),
        ] {
            assert_eq!(error.exit_code() as u8, code, "{error}");
        }
    }

    #[test]
    fn only_a_full_or_failing_disk_is_worth_another_try() {
        let full = || StoreError::NoSpace {
            action: "write",
            path: "x".into(),
            source: std::io::ErrorKind::StorageFull.into(),
        };
        assert!(StageError::from(full()).is_retryable());
        assert!(StageError::from(EngineError::from(full())).is_retryable());
        assert!(!StageError::bug("x").is_retryable());
        assert!(!StageError::from(StoreError::KeepTooFew { keep_last: 1 }).is_retryable());
    }
}
