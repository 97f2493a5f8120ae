//! One owner per run directory.
//!
//! The kernel's `flock` decides who owns a directory: it is released when its process ends, however it ends, so there is
//! no stale lock to judge by a clock. Because `flock` is unreliable on some network file systems the owner's id is read
//! again before every publish ([`Lock::check`]).

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::error::{Result, StoreError};
use crate::names::unique_id;

/// Name of the lock file in a run directory.
pub(crate) const LOCK_NAME: &str = "LOCK";
/// More than a lock file ever holds, in bytes.
const MAX_LOCK_BYTES: u64 = 4096;

/// Who holds a lock, as written in the lock file.
#[derive(Debug, Serialize, Deserialize)]
struct Owner {
    id: String,
    pid: u32,
    host: String,
}

/// A held lock; dropping it releases it.
#[derive(Debug)]
pub(crate) struct Lock {
    path: PathBuf,
    id: String,
    // Closing the file releases the lock.
    _file: File,
}

impl Lock {
    /// Takes the lock of `dir`, at once or not at all.
    ///
    /// # Errors
    /// [`StoreError::Locked`], naming the owner, if another process (or another handle in this one) holds it.
    pub(crate) fn acquire(dir: &Path) -> Result<Self> {
        let path = dir.join(LOCK_NAME);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|error| StoreError::io("open", &path, error))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let owner = read_owner(&path).map_or_else(
                    || "another process".to_owned(),
                    |owner| format!("process {} on {}", owner.pid, owner.host),
                );
                return Err(StoreError::Locked { dir: dir.to_path_buf(), owner });
            }
            Err(errno) => return Err(StoreError::io("lock", &path, errno.into())),
        }
        let owner = Owner { id: unique_id(), pid: std::process::id(), host: host_name() };
        let text = serde_json::to_string(&owner).map_err(|source| StoreError::Json { path: path.clone(), source })?;
        file.set_len(0)
            .and_then(|()| file.seek(SeekFrom::Start(0)))
            .and_then(|_| file.write_all(text.as_bytes()))
            .map_err(|error| StoreError::io("write", &path, error))?;
        Ok(Self { path, id: owner.id, _file: file })
    }

    /// Whether the lock is still ours.
    ///
    /// # Errors
    /// [`StoreError::Locked`] if another run has written its id into the lock file: nothing may be published any more.
    pub(crate) fn check(&self) -> Result<()> {
        match read_owner(&self.path) {
            Some(owner) if owner.id == self.id => Ok(()),
            other => Err(StoreError::Locked {
                dir: self.path.parent().unwrap_or(&self.path).to_path_buf(),
                owner: other.map_or_else(
                    || "nobody: its lock file was removed or overwritten".to_owned(),
                    |owner| format!("process {} on {}, which took it over", owner.pid, owner.host),
                ),
            }),
        }
    }
}

fn read_owner(path: &Path) -> Option<Owner> {
    let mut text = String::new();
    File::open(path).ok()?.take(MAX_LOCK_BYTES).read_to_string(&mut text).ok()?;
    serde_json::from_str(&text).ok()
}

fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map_or_else(|_| "an unknown host".to_owned(), |name| name.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_owner_is_refused_until_the_first_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let first = Lock::acquire(dir.path()).unwrap();
        first.check().unwrap();
        let error = Lock::acquire(dir.path()).unwrap_err();
        assert!(matches!(error, StoreError::Locked { .. }));
        assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
        first.check().unwrap();
        drop(first);
        Lock::acquire(dir.path()).unwrap();
    }

    #[test]
    fn a_lock_taken_over_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let lock = Lock::acquire(dir.path()).unwrap();
        std::fs::write(dir.path().join(LOCK_NAME), r#"{"id":"other","pid":1,"host":"elsewhere"}"#).unwrap();
        assert!(lock.check().unwrap_err().to_string().contains("elsewhere"));
        std::fs::remove_file(dir.path().join(LOCK_NAME)).unwrap();
        assert!(lock.check().is_err());
    }
}
