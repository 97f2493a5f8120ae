//! Writing a directory that appears whole or not at all.
//!
//! The order is what makes it so: files are created under a staging name and synced, the manifest is written last, the
//! staging directory is synced, renamed to its final name (the commit point), and the parent directory is synced. A stop
//! before the rename leaves a staging directory that the next owner of the run directory sweeps; a stop after it leaves
//! the finished entry.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use crate::error::{Result, StoreError};
use crate::file::{parent_of, write_synced};
use crate::lock::Lock;
use crate::manifest::{FileEntry, MANIFEST_NAME, Manifest};
use crate::names::{check_file_name, staging_name, trash_name};
use crate::published::Published;
use crate::vfs::{Vfs, VfsFile};

/// What a staging directory needs from the run directory it belongs to.
#[derive(Debug, Clone)]
pub(crate) struct Context {
    pub(crate) vfs: Arc<dyn Vfs>,
    pub(crate) lock: Arc<Lock>,
}

/// What to do when the final name is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Taken {
    /// Keep what is there if it is intact: the same entry was published before and is being made again.
    Keep,
    /// Put the new directory in its place.
    Replace,
}

/// A directory being written. Dropping it unpublished removes it.
#[derive(Debug)]
pub struct Staging {
    context: Context,
    /// Where the files are written.
    dir: PathBuf,
    /// Where they will be found.
    target: PathBuf,
    kind: String,
    taken: Taken,
    files: Vec<FileEntry>,
    published: bool,
}

impl Staging {
    /// Starts an entry that will be published at `target`, whose parent exists.
    pub(crate) fn create(context: Context, target: PathBuf, kind: &str, taken: Taken) -> Result<Self> {
        let name = target.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let dir = parent_of(&target).join(staging_name(&name));
        context.vfs.create_dir(&dir).map_err(|error| StoreError::io("create", &dir, error))?;
        Ok(Self { context, dir, target, kind: kind.to_owned(), taken, files: Vec::new(), published: false })
    }

    /// The staging directory, for writers that insist on a path; follow with [`Self::adopt`] for each file they made.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes one file.
    ///
    /// # Errors
    /// [`StoreError::Name`] for a name that is not plain or is used already, or an error of the file system.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let mut file = self.create_file(name)?;
        file.write_all(bytes).map_err(|error| StoreError::io("write", &file.path, error))?;
        file.finish()
    }

    /// Starts one file that is written in parts; [`StagedFile::finish`] completes it.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn create_file(&mut self, name: &str) -> Result<StagedFile<'_>> {
        self.check_new_name(name)?;
        let path = self.dir.join(name);
        let file = self.context.vfs.create_file(&path).map_err(|error| StoreError::io("create", &path, error))?;
        Ok(StagedFile {
            file,
            path,
            name: name.to_owned(),
            bytes: 0,
            digest: blake3::Hasher::new(),
            files: &mut self.files,
        })
    }

    /// Takes in a file that someone else has written into [`Self::dir`].
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn adopt(&mut self, name: &str) -> Result<()> {
        self.check_new_name(name)?;
        let path = self.dir.join(name);
        self.context.vfs.sync_file(&path).map_err(|error| StoreError::io("sync", &path, error))?;
        let mut file = File::open(&path).map_err(|error| StoreError::io("open", &path, error))?;
        let mut digest = blake3::Hasher::new();
        let mut bytes = 0;
        let mut chunk = vec![0; 1 << 20];
        loop {
            match file.read(&mut chunk) {
                Ok(0) => break,
                Ok(count) => {
                    digest.update(&chunk[..count]);
                    bytes += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(StoreError::io("read", &path, error)),
            }
        }
        self.files.push(FileEntry { name: name.to_owned(), bytes, blake3: digest.finalize().to_hex().to_string() });
        Ok(())
    }

    /// Publishes the files with `meta` beside them and returns the published directory.
    ///
    /// If an intact entry has the final name already, a numbered entry is kept as it is and the staged one dropped (a
    /// resumed run makes the same step again); an `export` is replaced.
    ///
    /// # Errors
    /// [`StoreError::Locked`] if another run has taken the run directory over, or an error of the file system. Nothing
    /// is published then, except that an error from syncing the parent after the rename leaves the entry in place but
    /// perhaps not yet on the device.
    pub fn publish(mut self, meta: Value) -> Result<Published> {
        let manifest = Manifest::new(&self.kind, std::mem::take(&mut self.files), meta);
        let manifest_path = self.dir.join(MANIFEST_NAME);
        let text = manifest.to_text(&manifest_path)?;
        write_synced(self.vfs(), &manifest_path, text.as_bytes())?;
        self.vfs().sync_dir(&self.dir).map_err(|error| StoreError::io("sync", &self.dir, error))?;
        self.context.lock.check()?;
        let parent = parent_of(&self.target);
        let is_taken = self.target.symlink_metadata().is_ok();
        if is_taken && self.taken == Taken::Keep {
            match Published::open(&self.target) {
                Ok(existing) => return Ok(existing),
                Err(StoreError::Corrupt { problem, .. }) => {
                    let aside = quarantine(self.vfs(), &self.target)?;
                    tracing::warn!("{}: {problem}; set aside as {}", self.target.display(), aside.display());
                }
                Err(error) => return Err(error),
            }
        }
        if is_taken && self.taken == Taken::Replace {
            self.replace()?;
        } else {
            self.vfs()
                .rename(&self.dir, &self.target)
                .map_err(|error| StoreError::io("publish", &self.target, error))?;
        }
        self.published = true;
        self.vfs().sync_dir(&parent).map_err(|error| StoreError::io("sync", &parent, error))?;
        Ok(Published::just_written(self.target.clone(), manifest))
    }

    /// Puts the staged directory where another is, leaving no moment without one where the file system can swap names.
    fn replace(&self) -> Result<()> {
        let failed = |error| StoreError::io("publish", &self.target, error);
        let name = self.target.file_name().unwrap_or_default().to_string_lossy();
        let old = match self.vfs().exchange(&self.dir, &self.target) {
            Ok(()) => self.dir.clone(),
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                let trash = parent_of(&self.target).join(trash_name(&name));
                self.vfs().rename(&self.target, &trash).map_err(failed)?;
                self.vfs().rename(&self.dir, &self.target).map_err(failed)?;
                trash
            }
            Err(error) => return Err(failed(error)),
        };
        // The new directory is in place; what stays of the old one is swept when the run directory is next opened.
        if let Err(error) = self.vfs().remove_dir_all(&old) {
            tracing::warn!("cannot remove {}: {error}", old.display());
        }
        Ok(())
    }

    fn vfs(&self) -> &dyn Vfs {
        &*self.context.vfs
    }

    fn check_new_name(&self, name: &str) -> Result<()> {
        check_file_name(name)?;
        let problem = if name == MANIFEST_NAME {
            "the store writes that file itself"
        } else if self.files.iter().any(|file| file.name == name) {
            "it is used twice"
        } else {
            return Ok(());
        };
        Err(StoreError::Name { name: name.to_owned(), problem })
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.published {
            // Best effort: what stays behind is swept when the run directory is next opened.
            let _ = self.context.vfs.remove_dir_all(&self.dir);
        }
    }
}

/// One staged file being written; its digest is taken on the way. Unfinished, it is not part of the entry.
pub struct StagedFile<'a> {
    file: Box<dyn VfsFile>,
    path: PathBuf,
    name: String,
    bytes: u64,
    digest: blake3::Hasher,
    files: &'a mut Vec<FileEntry>,
}

impl StagedFile<'_> {
    /// Syncs the file and lists it.
    ///
    /// # Errors
    /// An error of the file system.
    pub fn finish(mut self) -> Result<()> {
        self.file.sync().map_err(|error| StoreError::io("sync", &self.path, error))?;
        let blake3 = self.digest.finalize().to_hex().to_string();
        self.files.push(FileEntry { name: self.name, bytes: self.bytes, blake3 });
        Ok(())
    }
}

impl Write for StagedFile<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let count = self.file.write(buffer)?;
        self.digest.update(&buffer[..count]);
        self.bytes += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Renames a damaged entry so that it no longer counts, and returns its new path.
pub(crate) fn quarantine(vfs: &dyn Vfs, entry: &Path) -> Result<PathBuf> {
    let name = entry.file_name().unwrap_or_default().to_string_lossy();
    let parent = parent_of(entry);
    let aside = (1u32..)
        .map(|attempt| match attempt {
            1 => parent.join(format!("quarantine-{name}")),
            _ => parent.join(format!("quarantine-{name}.{attempt}")),
        })
        .find(|path| path.symlink_metadata().is_err())
        .unwrap_or_else(|| parent.join(trash_name(&name)));
    vfs.rename(entry, &aside).map_err(|error| StoreError::io("set aside", entry, error))?;
    vfs.sync_dir(&parent).map_err(|error| StoreError::io("sync", &parent, error))?;
    Ok(aside)
}
