//! Durable bytes: atomic publish, manifests, digests, retention.
//!
//! Everything that Tandem writes goes through this crate, and every promise about interrupted runs is kept here:
//!
//! * A published directory ([`Published`]) exists if and only if its name exists: it is written elsewhere
//!   ([`Staging`]), synced, and renamed into place. The rename is the one and only commit point; there is no pointer to
//!   the newest state that could disagree with what is on disk.
//! * Every published file is listed with its length and BLAKE3 digest in a [`Manifest`] that digests itself, so any
//!   changed bit is found before the bytes are used.
//! * A numbered [`Series`] (`step-N`, `iter-N`) offers the newest *valid* entry and sets damaged ones aside.
//! * One run owns a [`RunDir`] at a time; a second one is refused at once.
//!
//! | file | what is in it |
//! |---|---|
//! | `run_dir` | the directory of a run and what it holds |
//! | `lock` | one owner per run directory |
//! | `staging`, `published` | the two ends of a publish |
//! | `series` | numbered entries: newest valid, quarantine, retention |
//! | `manifest` | names, lengths, digests |
//! | `row_log` | append-only rows that survive an interruption (`metrics.jsonl`) |
//! | `file` | one small file, replaced atomically |
//! | `vfs` | the seam where the fault tests break things |
//!
//! The crate knows nothing of tensors, models or training.

mod error;
mod file;
mod lock;
mod manifest;
mod names;
mod published;
mod row_log;
mod run_dir;
mod series;
mod staging;
mod vfs;

pub use error::{Result, StoreError};
pub use file::atomic_write_file;
pub use manifest::{FileEntry, MANIFEST_FORMAT, MANIFEST_NAME, Manifest};
pub use published::Published;
pub use row_log::RowLog;
pub use run_dir::RunDir;
pub use series::Series;
pub use staging::{StagedFile, Staging};
pub use vfs::{OsVfs, Vfs, VfsFile};
