//! Reading rows from files: JSON Lines, JSON, Parquet and Arrow, told apart by the file name's extension.
//!
//! All readers keep the same promises: only regular files are opened, every size is bounded ([`crate::limits`]), text is never
//! repaired silently, a bad row is an error that names file and line (or skipped and counted, if asked), and a panic inside
//! a columnar decoder is an error like any other.

mod arrow;
mod columns;
mod json;
mod jsonl;
mod parquet;
mod strict;

use std::fs::File;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{DataError, Result};
use crate::limits;
use crate::row::{Fields, Origin, Row};

/// What to do with a row that cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnBadRow {
    /// Stop with an error that names it.
    #[default]
    Error,
    /// Leave it out and count it.
    Skip,
}

/// How to treat bad rows.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ReadOptions {
    /// Stop at a bad row or skip it.
    pub on_bad_row: OnBadRow,
    /// The largest share of bad rows that may be skipped, 0…1.
    pub max_bad_fraction: f64,
}

impl Default for ReadOptions {
    fn default() -> Self {
        Self { on_bad_row: OnBadRow::Error, max_bad_fraction: 0.01 }
    }
}

/// The rows of one file, in the file's order.
#[derive(Debug, Clone)]
pub struct Rows {
    /// The file.
    pub path: PathBuf,
    /// The rows that could be read; never empty.
    pub rows: Vec<Row>,
    /// Bad rows left out.
    pub skipped: usize,
}

impl Rows {
    /// A digest of the rows' contents in their order (lower-case hex). A checkpoint keeps it to notice data that has changed.
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for row in &self.rows {
            hasher.update(&row.content_hash(0));
        }
        hasher.finalize().to_hex().to_string()
    }
}

/// Reads all rows of a `.jsonl`, `.ndjson`, `.json`, `.parquet`, `.arrow` or `.feather` file.
///
/// # Errors
/// Missing, empty, damaged or oversized files, files that are not regular, unknown extensions, and bad rows as `options` say.
pub fn read_rows(path: impl AsRef<Path>, options: &ReadOptions) -> Result<Rows> {
    let path = path.as_ref();
    let read = match extension(path).as_str() {
        "jsonl" | "ndjson" => jsonl::read,
        "json" => json::read,
        "parquet" => parquet::read,
        "arrow" | "feather" => arrow::read,
        _ => {
            regular_file(path)?;
            return Err(DataError::UnknownFormat { path: path.to_owned() });
        }
    };
    let mut rows = Collector::new(path, options);
    read(path, &mut rows)?;
    rows.finish()
}

fn extension(path: &Path) -> String {
    path.extension().map(|extension| extension.to_string_lossy().to_ascii_lowercase()).unwrap_or_default()
}

/// Opens a file for reading after checking that it is a regular one: a pipe or device could block or never end.
pub(crate) fn regular_file(path: &Path) -> Result<(File, u64)> {
    let metadata = std::fs::metadata(path).map_err(|source| DataError::io(path, source))?;
    if metadata.is_dir() {
        return Err(DataError::NotAFile { path: path.to_owned(), what: "a folder" });
    }
    if !metadata.is_file() {
        return Err(DataError::NotAFile { path: path.to_owned(), what: "a pipe or device" });
    }
    let file = File::open(path).map_err(|source| DataError::io(path, source))?;
    Ok((file, metadata.len()))
}

/// Fails if `size` passes `limit`.
pub(crate) fn bounded(path: &Path, what: &str, size: u64, limit: u64) -> Result<()> {
    if size <= limit {
        return Ok(());
    }
    Err(DataError::TooLarge { path: path.to_owned(), what: what.to_owned(), size, limit })
}

/// The whole of a regular file of at most `limit` bytes.
pub(crate) fn read_bounded(path: &Path, what: &str, limit: u64) -> Result<Vec<u8>> {
    use std::io::Read;
    let (file, size) = regular_file(path)?;
    bounded(path, what, size, limit)?;
    let mut bytes = Vec::with_capacity(size as usize);
    // The file may grow while it is read; `take` keeps the bound.
    file.take(limit + 1).read_to_end(&mut bytes).map_err(|source| DataError::io(path, source))?;
    bounded(path, what, bytes.len() as u64, limit)?;
    Ok(bytes)
}

/// Runs a decoder that may panic on damaged input (arrow-rs treats such panics as bugs, not as vulnerabilities) and turns
/// a panic into an error.
pub(crate) fn catch_panics<T>(path: &Path, decode: impl FnOnce() -> Result<T>) -> Result<T> {
    let quiet = quiet::Guard::new();
    let result = std::panic::catch_unwind(AssertUnwindSafe(decode));
    drop(quiet);
    result.unwrap_or_else(|panic| {
        let said = panic.downcast_ref::<String>().cloned();
        let said = said.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Err(DataError::Decode {
            path: path.to_owned(),
            place: "decoder".into(),
            reason: format!("the decoder failed on it ({})", said.unwrap_or_else(|| "no message".into())),
        })
    })
}

/// Keeps the message of a caught panic off the terminal, where it would look like a crash. Installed once, around the hook
/// that is there; other threads and other panics are reported as before.
mod quiet {
    use std::cell::Cell;
    use std::sync::Once;

    thread_local! {
        static QUIET: Cell<u32> = const { Cell::new(0) };
    }
    static INSTALL: Once = Once::new();

    /// While one lives, panics of this thread print nothing.
    pub(super) struct Guard;

    impl Guard {
        pub(super) fn new() -> Self {
            INSTALL.call_once(|| {
                let before = std::panic::take_hook();
                std::panic::set_hook(Box::new(move |info| {
                    if QUIET.with(Cell::get) == 0 {
                        before(info);
                    }
                }));
            });
            QUIET.with(|depth| depth.set(depth.get() + 1));
            Guard
        }
    }

    impl Drop for Guard {
        fn drop(&mut self) {
            QUIET.with(|depth| depth.set(depth.get() - 1));
        }
    }
}

/// Gathers rows and applies the policy for bad ones.
struct Collector<'a> {
    path: Arc<Path>,
    options: &'a ReadOptions,
    rows: Vec<Row>,
    bad: usize,
    first_bad: Option<String>,
}

impl<'a> Collector<'a> {
    fn new(path: &Path, options: &'a ReadOptions) -> Self {
        Self { path: Arc::from(path), options, rows: Vec::new(), bad: 0, first_bad: None }
    }

    /// Takes a line's outcome.
    fn line(&mut self, number: u64, fields: Result<Fields, String>) -> Result<()> {
        self.take(Origin::line(&self.path, number), fields)
    }

    /// Takes a row's outcome.
    fn row(&mut self, number: u64, fields: Result<Fields, String>) -> Result<()> {
        self.take(Origin::row(&self.path, number), fields)
    }

    fn take(&mut self, origin: Origin, fields: Result<Fields, String>) -> Result<()> {
        match fields {
            Ok(fields) => {
                bounded(&self.path, "the number of rows", self.rows.len() as u64 + 1, limits::ROWS as u64)?;
                self.rows.push(Row { fields, origin });
            }
            Err(reason) => {
                let error = DataError::BadRow { origin: origin.to_string(), reason };
                if self.options.on_bad_row == OnBadRow::Error {
                    return Err(error);
                }
                self.bad += 1;
                self.first_bad.get_or_insert_with(|| error.to_string());
            }
        }
        Ok(())
    }

    fn finish(self) -> Result<Rows> {
        let path = self.path.to_path_buf();
        let total = self.rows.len() + self.bad;
        if let Some(first) = self.first_bad
            && self.bad as f64 > self.options.max_bad_fraction * total as f64
        {
            let max_fraction = self.options.max_bad_fraction;
            return Err(DataError::TooManyBadRows { path, bad: self.bad, total, max_fraction, first });
        }
        if self.rows.is_empty() {
            let reason = match total {
                0 => "the file is empty".to_owned(),
                _ => format!("0 of {total} rows could be read"),
            };
            return Err(DataError::Empty { path, reason });
        }
        Ok(Rows { path, rows: self.rows, skipped: self.bad })
    }
}
