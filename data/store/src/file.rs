//! One small file, replaced atomically.

use std::ffi::OsStr;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::{Result, StoreError};
use crate::names::staging_name;
use crate::vfs::{OsVfs, Vfs};

/// Writes `bytes` to `path`, replacing what is there: readers see the old content or the new, never a part, and once
/// this returns the new content survives a power loss.
///
/// # Errors
/// Any [`StoreError`] of the file system; the old content is then untouched.
pub fn atomic_write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    atomic_write_file_with(&OsVfs, path, bytes)
}

/// [`atomic_write_file`] on any file system.
pub(crate) fn atomic_write_file_with(vfs: &dyn Vfs, path: &Path, bytes: &[u8]) -> Result<()> {
    let name = path.file_name().and_then(OsStr::to_str).ok_or_else(|| StoreError::Name {
        name: path.display().to_string(),
        problem: "it does not end in a file name",
    })?;
    let parent = parent_of(path);
    let staged = parent.join(staging_name(name));
    let written = write_synced(vfs, &staged, bytes)
        .and_then(|()| vfs.rename(&staged, path).map_err(|error| StoreError::io("rename", &staged, error)));
    if let Err(error) = written {
        // Best effort: what stays behind is swept when the run directory is next opened.
        let _ = vfs.remove_file(&staged);
        return Err(error);
    }
    vfs.sync_dir(&parent).map_err(|error| StoreError::io("sync", &parent, error))
}

/// Creates `path` with `bytes` and syncs it.
pub(crate) fn write_synced(vfs: &dyn Vfs, path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = vfs.create_file(path).map_err(|error| StoreError::io("create", path, error))?;
    file.write_all(bytes).map_err(|error| StoreError::io("write", path, error))?;
    file.sync().map_err(|error| StoreError::io("sync", path, error))
}

/// The directory of `path`; a bare file name lives in the working directory.
pub(crate) fn parent_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn creates_and_replaces() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.json");
        atomic_write_file(&path, b"one").unwrap();
        atomic_write_file(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no leftovers");
    }

    #[test]
    fn a_failure_names_the_path() {
        let dir = tempfile::tempdir().unwrap();
        let error = atomic_write_file(&dir.path().join("no/run.json"), b"x").unwrap_err();
        assert!(error.to_string().contains("no/"), "{error}");
    }
}
