//! What the store can refuse, and what to do about it.

use std::io;
use std::path::{Path, PathBuf};

/// Result of a store operation.
pub type Result<T> = std::result::Result<T, StoreError>;

/// Bytes could not be written, or cannot be trusted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Another process owns the run directory.
    #[error(
        "run directory {} is in use by {owner}; wait for that run to end, stop it, or choose another --output-dir",
        dir.display()
    )]
    Locked {
        /// The run directory.
        dir: PathBuf,
        /// What the lock file says about its owner.
        owner: String,
    },
    /// The file system is full (or a quota or file-size limit is reached).
    #[error(
        "no space left while trying to {action} {}: {source}; free some space or lower the number of kept checkpoints",
        path.display()
    )]
    NoSpace {
        /// What was being done.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The device failed to read or write.
    #[error("the storage device failed while trying to {action} {}: {source}; check the disk", path.display())]
    Device {
        /// What was being done.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// Any other error of the file system.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// A published directory is not what was published.
    #[error("{} is damaged: {problem}", path.display())]
    Corrupt {
        /// The damaged file, or the directory if it is not one file's fault.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A manifest was written by a newer version of this program.
    #[error(
        "{} has manifest format {found}, this build reads up to {known}; use a newer build to read it",
        path.display()
    )]
    NewerFormat {
        /// The published directory.
        path: PathBuf,
        /// The format it has.
        found: u32,
        /// The newest format this build reads.
        known: u32,
    },
    /// There are entries, but none of them can be trusted.
    #[error(
        "no valid entry in {}: {tried}; restore an intact copy there, or pass --resume never to start over \
         (the old files are set aside, not deleted)",
        dir.display()
    )]
    NoneValid {
        /// The directory of the series.
        dir: PathBuf,
        /// Each entry and what is wrong with it.
        tried: String,
    },
    /// A file name that is not one plain path component.
    #[error("{name:?} cannot be a published file name: {problem}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Retention was asked to leave no fallback.
    #[error("keep_last = {keep_last} leaves no fallback for a damaged newest checkpoint; keep at least 2")]
    KeepTooFew {
        /// The number asked for.
        keep_last: usize,
    },
    /// A value could not be written as JSON.
    #[error("cannot write {} as JSON: {source}", path.display())]
    Json {
        /// Where it was to be written.
        path: PathBuf,
        /// The serialiser's complaint.
        source: serde_json::Error,
    },
}

impl StoreError {
    /// Sorts an operating-system error into the kinds that callers treat differently.
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        let path = path.to_path_buf();
        let device_failed = source.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error());
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                StoreError::NoSpace { action, path, source }
            }
            _ if device_failed => StoreError::Device { action, path, source },
            _ => StoreError::Io { action, path, source },
        }
    }

    /// A [`StoreError::Corrupt`].
    pub(crate) fn corrupt(path: &Path, problem: impl Into<String>) -> Self {
        StoreError::Corrupt { path: path.to_path_buf(), problem: problem.into() }
    }

    /// Whether a later attempt may succeed without anything being changed by hand in the run directory: the disk was
    /// full or failed. What was published before is untouched, so a run may go on and try again at its next checkpoint.
    pub fn is_retryable(&self) -> bool {
        matches!(self, StoreError::NoSpace { .. } | StoreError::Device { .. })
    }
}
