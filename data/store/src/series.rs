//! Numbered entries of one kind: `checkpoints/step-N`, `experience/iter-N`.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Result, StoreError};
use crate::names::{entry_number, trash_name};
use crate::published::Published;
use crate::staging::{Context, Staging, Taken, quarantine};

/// The smallest number of entries retention may leave: one, and one to fall back to.
const MIN_KEEP: usize = 2;

/// A directory of published entries named `{prefix}-{number}`. Anything else in it is left alone.
#[derive(Debug)]
pub struct Series {
    context: Context,
    dir: PathBuf,
    prefix: &'static str,
    kind: &'static str,
}

impl Series {
    pub(crate) fn new(context: Context, dir: PathBuf, prefix: &'static str, kind: &'static str) -> Self {
        Self { context, dir, prefix, kind }
    }

    /// The directory that holds the entries.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where entry `number` is or would be.
    pub fn path(&self, number: u64) -> PathBuf {
        self.dir.join(format!("{}-{number}", self.prefix))
    }

    /// Starts entry `number`.
    ///
    /// # Errors
    /// An error of the file system.
    pub fn stage(&self, number: u64) -> Result<Staging> {
        Staging::create(self.context.clone(), self.path(number), self.kind, Taken::Keep)
    }

    /// The numbers of the entries, ascending. They are not checked.
    ///
    /// # Errors
    /// An error of the file system.
    pub fn numbers(&self) -> Result<Vec<u64>> {
        let mut numbers = Vec::new();
        self.each_directory(|name| numbers.extend(entry_number(name, self.prefix)))?;
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// Entry `number`, checked; `None` if there is none. A damaged entry is set aside as `quarantine-…` and counts as
    /// absent: for what can be made again.
    ///
    /// # Errors
    /// An error of the file system, or a manifest of a newer format.
    pub fn open(&self, number: u64) -> Result<Option<Published>> {
        let path = self.path(number);
        if path.symlink_metadata().is_err() {
            return Ok(None);
        }
        Ok(self.open_or_set_aside(&path)?.ok())
    }

    /// The newest entry that is intact; `None` if there never was one. Damaged entries on the way are set aside.
    ///
    /// # Errors
    /// [`StoreError::NoneValid`] if there are entries but none is intact: the run must not silently start over.
    pub fn newest_valid(&self) -> Result<Option<(u64, Published)>> {
        let mut tried = Vec::new();
        for number in self.numbers()?.into_iter().rev() {
            match self.open_or_set_aside(&self.path(number))? {
                Ok(published) => return Ok(Some((number, published))),
                Err(problem) => tried.push(problem),
            }
        }
        if tried.is_empty() {
            // What an earlier attempt has set aside still counts as having been there.
            self.each_directory(|name| {
                if name.strip_prefix("quarantine-").is_some_and(|rest| rest.starts_with(self.prefix)) {
                    tried.push(format!("{name} was set aside as damaged"));
                }
            })?;
        }
        if tried.is_empty() {
            Ok(None)
        } else {
            Err(StoreError::NoneValid { dir: self.dir.clone(), tried: tried.join("; ") })
        }
    }

    /// Removes all but the newest `keep_last` entries. An entry is renamed before it is deleted, so that one that is
    /// half deleted never looks like an entry.
    ///
    /// # Errors
    /// [`StoreError::KeepTooFew`] for less than two, or an error of the file system.
    pub fn retain(&self, keep_last: usize) -> Result<()> {
        if keep_last < MIN_KEEP {
            return Err(StoreError::KeepTooFew { keep_last });
        }
        let numbers = self.numbers()?;
        for &number in &numbers[..numbers.len().saturating_sub(keep_last)] {
            let entry = self.path(number);
            let trash = self.dir.join(trash_name(&format!("{}-{number}", self.prefix)));
            let vfs = &*self.context.vfs;
            vfs.rename(&entry, &trash).map_err(|error| StoreError::io("remove", &entry, error))?;
            vfs.sync_dir(&self.dir).map_err(|error| StoreError::io("sync", &self.dir, error))?;
            vfs.remove_dir_all(&trash).map_err(|error| StoreError::io("remove", &trash, error))?;
        }
        Ok(())
    }

    /// The checked entry, or, after setting it aside, what is wrong with it.
    fn open_or_set_aside(&self, path: &Path) -> Result<std::result::Result<Published, String>> {
        let problem = match Published::open(path) {
            Ok(published) if published.kind() == self.kind => return Ok(Ok(published)),
            Ok(published) => format!("{} holds a {:?}, not a {:?}", path.display(), published.kind(), self.kind),
            Err(error @ StoreError::Corrupt { .. }) => error.to_string(),
            Err(error) => return Err(error),
        };
        let aside = quarantine(&*self.context.vfs, path)?;
        tracing::warn!("{problem}; set aside as {}", aside.display());
        Ok(Err(problem))
    }

    /// Calls `each` with the name of every real directory (no symbolic links) that has a UTF-8 name.
    fn each_directory(&self, mut each: impl FnMut(&str)) -> Result<()> {
        let failed = |error| StoreError::io("list", &self.dir, error);
        for entry in fs::read_dir(&self.dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if entry.file_type().map_err(failed)?.is_dir()
                && let Some(name) = entry.file_name().to_str()
            {
                each(name);
            }
        }
        Ok(())
    }
}
