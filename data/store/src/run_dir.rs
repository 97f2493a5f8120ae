//! The directory of a run.
//!
//! ```text
//! LOCK                  its owner
//! run.json              what is being run
//! metrics.jsonl         one row per step
//! checkpoints/step-N/   states to resume from
//! experience/iter-N/    rollouts of PPO
//! export/               the finished model
//! previous-N/           what an earlier run left, set aside by a fresh start
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Result, StoreError};
use crate::file::atomic_write_file_with;
use crate::lock::Lock;
use crate::names::is_leftover;
use crate::row_log::RowLog;
use crate::series::Series;
use crate::staging::{Context, Staging, Taken};
use crate::vfs::{OsVfs, Vfs};

const RUN_FILE: &str = "run.json";
const METRICS_FILE: &str = "metrics.jsonl";
const CHECKPOINTS: &str = "checkpoints";
const EXPERIENCE: &str = "experience";
const CHECKPOINT_PREFIX: &str = "step";
const EXPERIENCE_PREFIX: &str = "iter";
const EXPORT: &str = "export";
const ADAPTER: &str = "adapter";
/// What a fresh start sets aside.
const RUN_STATE: [&str; 5] = [RUN_FILE, METRICS_FILE, CHECKPOINTS, EXPERIENCE, EXPORT];

/// A run directory owned by this process until dropped.
#[derive(Debug)]
pub struct RunDir {
    root: PathBuf,
    context: Context,
}

impl RunDir {
    /// Creates or opens `root` and takes its lock; what an interrupted run left half-written is removed.
    ///
    /// # Errors
    /// [`StoreError::Locked`] at once if another run owns it, or an error of the file system: no permission, a file in
    /// the way.
    pub fn open(root: &Path) -> Result<Self> {
        Self::open_with(root, Arc::new(OsVfs))
    }

    /// [`Self::open`] on another file system; the seam of the fault tests.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_with(root: &Path, vfs: Arc<dyn Vfs>) -> Result<Self> {
        fs::create_dir_all(root).map_err(|error| StoreError::io("create", root, error))?;
        let lock = Arc::new(Lock::acquire(root)?);
        let run = Self { root: root.to_path_buf(), context: Context { vfs, lock } };
        for name in [CHECKPOINTS, EXPERIENCE] {
            run.create_directory(&run.root.join(name))?;
        }
        run.context.vfs.sync_dir(root).map_err(|error| StoreError::io("sync", root, error))?;
        for dir in [run.root.clone(), run.root.join(CHECKPOINTS), run.root.join(EXPERIENCE)] {
            run.sweep(&dir)?;
        }
        Ok(run)
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// `checkpoints/step-N`.
    pub fn checkpoints(&self) -> Series {
        Series::new(self.context.clone(), self.root.join(CHECKPOINTS), CHECKPOINT_PREFIX, "checkpoint")
    }

    /// Where the checkpoint of `step` of a run in `root` is, for readers that do not own the run.
    pub fn checkpoint_path(root: &Path, step: u64) -> PathBuf {
        root.join(CHECKPOINTS).join(format!("{CHECKPOINT_PREFIX}-{step}"))
    }

    /// Where the rollout of `iteration` of a run in `root` is, likewise.
    pub fn experience_path(root: &Path, iteration: u64) -> PathBuf {
        root.join(EXPERIENCE).join(format!("{EXPERIENCE_PREFIX}-{iteration}"))
    }

    /// `experience/iter-N`.
    pub fn experience(&self) -> Series {
        Series::new(self.context.clone(), self.root.join(EXPERIENCE), EXPERIENCE_PREFIX, "experience")
    }

    /// Where the finished model is or will be.
    pub fn export_path(&self) -> PathBuf {
        self.root.join(EXPORT)
    }

    /// Starts the finished model; publishing it replaces an earlier one.
    ///
    /// # Errors
    /// An error of the file system.
    pub fn stage_export(&self) -> Result<Staging> {
        Staging::create(self.context.clone(), self.export_path(), EXPORT, Taken::Replace)
    }

    /// Starts the adapters that the finished model was made with; publishing them replaces earlier ones.
    ///
    /// # Errors
    /// An error of the file system.
    pub fn stage_adapter(&self) -> Result<Staging> {
        Staging::create(self.context.clone(), self.root.join(ADAPTER), ADAPTER, Taken::Replace)
    }

    /// The text of `run.json`, if there is one.
    ///
    /// # Errors
    /// An error of the file system, text that is not UTF-8 among them.
    pub fn read_run_file(&self) -> Result<Option<String>> {
        let path = self.root.join(RUN_FILE);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(StoreError::io("read", &path, error)),
        }
    }

    /// Replaces `run.json` atomically.
    ///
    /// # Errors
    /// An error of the file system, or [`StoreError::Locked`] if the directory was taken over.
    pub fn write_run_file(&self, text: &str) -> Result<()> {
        self.context.lock.check()?;
        atomic_write_file_with(&*self.context.vfs, &self.root.join(RUN_FILE), text.as_bytes())
    }

    /// Opens `metrics.jsonl` for appending; see [`RowLog::open`].
    ///
    /// # Errors
    /// An error of the file system.
    pub fn open_metrics(&self, last_step: Option<u64>) -> Result<RowLog> {
        RowLog::open(&self.root.join(METRICS_FILE), last_step)
    }

    /// Whether an earlier run has left anything here.
    ///
    /// # Errors
    /// An error of the file system.
    pub fn is_used(&self) -> Result<bool> {
        let exists = |name| self.root.join(name).symlink_metadata().is_ok();
        let has_entries = [CHECKPOINTS, EXPERIENCE].into_iter().map(|name| {
            let dir = self.root.join(name);
            let mut entries = fs::read_dir(&dir).map_err(|error| StoreError::io("list", &dir, error))?;
            Ok(entries.next().is_some())
        });
        let has_entries = has_entries.collect::<Result<Vec<bool>>>()?;
        Ok(has_entries.contains(&true) || [RUN_FILE, METRICS_FILE, EXPORT].into_iter().any(exists))
    }

    /// Moves everything an earlier run has left into `previous-N/`, for a fresh start, and returns that directory.
    /// Nothing is deleted. `None` if there was nothing.
    ///
    /// # Errors
    /// An error of the file system.
    pub fn set_aside(&self) -> Result<Option<PathBuf>> {
        if !self.is_used()? {
            return Ok(None);
        }
        let vfs = &*self.context.vfs;
        let aside = (1u32..)
            .map(|attempt| self.root.join(format!("previous-{attempt}")))
            .find(|path| path.symlink_metadata().is_err())
            .unwrap_or_else(|| self.root.join("previous"));
        vfs.create_dir(&aside).map_err(|error| StoreError::io("create", &aside, error))?;
        for name in RUN_STATE {
            let from = self.root.join(name);
            if from.symlink_metadata().is_ok() {
                vfs.rename(&from, &aside.join(name)).map_err(|error| StoreError::io("set aside", &from, error))?;
            }
        }
        for name in [CHECKPOINTS, EXPERIENCE] {
            self.create_directory(&self.root.join(name))?;
        }
        for dir in [&aside, &self.root] {
            vfs.sync_dir(dir).map_err(|error| StoreError::io("sync", dir, error))?;
        }
        Ok(Some(aside))
    }

    /// Refuses to start writing `bytes` that will not fit.
    ///
    /// # Errors
    /// [`StoreError::NoSpace`] stating how much is needed and how much is free.
    pub fn check_free_space(&self, bytes: u64) -> Result<()> {
        let stat =
            rustix::fs::statvfs(&self.root).map_err(|errno| StoreError::io("look at", &self.root, errno.into()))?;
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        if free >= bytes {
            return Ok(());
        }
        Err(StoreError::NoSpace {
            action: "write",
            path: self.root.clone(),
            source: std::io::Error::new(
                std::io::ErrorKind::StorageFull,
                format!("{bytes} bytes are needed, {free} are free"),
            ),
        })
    }

    /// Creates `path` unless it is a directory already.
    fn create_directory(&self, path: &Path) -> Result<()> {
        match path.symlink_metadata() {
            Ok(found) if found.is_dir() => Ok(()),
            Ok(_) => Err(StoreError::io(
                "create",
                path,
                std::io::Error::new(std::io::ErrorKind::AlreadyExists, "something else has that name; remove it"),
            )),
            Err(_) => self.context.vfs.create_dir(path).map_err(|error| StoreError::io("create", path, error)),
        }
    }

    /// Removes what an interrupted publish or removal has left in `dir`. Holding the lock means that it is dead.
    fn sweep(&self, dir: &Path) -> Result<()> {
        let failed = |error| StoreError::io("list", dir, error);
        for entry in fs::read_dir(dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name();
            if !name.to_str().is_some_and(is_leftover) {
                continue;
            }
            let kind = entry.file_type().map_err(failed)?;
            let path = entry.path();
            let removed = if kind.is_dir() {
                self.context.vfs.remove_dir_all(&path)
            } else {
                self.context.vfs.remove_file(&path)
            };
            removed.map_err(|error| StoreError::io("remove", &path, error))?;
        }
        Ok(())
    }
}
