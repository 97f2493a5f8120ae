//! Append-only rows of JSON, one per line, that fit together after an interruption.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use crate::error::{Result, StoreError};

/// A file of JSON rows (`metrics.jsonl`), open for appending.
///
/// Rows have a `step` and are appended in step order. Each row is written by one call, so a reader that follows the file
/// sees whole rows, save the last one after a crash.
#[derive(Debug)]
pub struct RowLog {
    path: PathBuf,
    file: File,
    last_row: Option<Value>,
}

impl RowLog {
    /// Opens or creates `path`. What was written after step `last_step` is cut off, and so is a torn last line: the steps
    /// that follow will be made, and logged, again. `None` keeps nothing.
    ///
    /// # Errors
    /// An error of the file system.
    pub fn open(path: &Path, last_step: Option<u64>) -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(path)
            .map_err(|error| StoreError::io("open", path, error))?;
        let (keep_bytes, last_row) =
            kept_rows(&file, last_step).map_err(|error| StoreError::io("read", path, error))?;
        file.set_len(keep_bytes).map_err(|error| StoreError::io("cut", path, error))?;
        Ok(Self { path: path.to_path_buf(), file, last_row })
    }

    /// The last row kept by [`Self::open`].
    pub fn last_row(&self) -> Option<&Value> {
        self.last_row.as_ref()
    }

    /// Appends one row.
    ///
    /// # Errors
    /// An error of the file system, or a row that JSON cannot hold.
    pub fn append<T: Serialize>(&mut self, row: &T) -> Result<()> {
        let mut line =
            serde_json::to_vec(row).map_err(|source| StoreError::Json { path: self.path.clone(), source })?;
        line.push(b'\n');
        self.file.write_all(&line).map_err(|error| StoreError::io("append to", &self.path, error))
    }

    /// Returns once all rows are on the device. Call it before publishing the checkpoint of the last row's step, so that
    /// no row of a published step can be missing.
    ///
    /// # Errors
    /// An error of the file system.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(|error| StoreError::io("sync", &self.path, error))
    }
}

/// Length of the leading rows that are whole and not after `last_step`, and the last of them.
fn kept_rows(file: &File, last_step: Option<u64>) -> std::io::Result<(u64, Option<Value>)> {
    let mut kept = (0, None);
    let Some(last_step) = last_step else { return Ok(kept) };
    let mut reader = BufReader::new(file);
    let mut line = Vec::new();
    loop {
        line.clear();
        let count = reader.read_until(b'\n', &mut line)?;
        if count == 0 || line.last() != Some(&b'\n') {
            return Ok(kept);
        }
        let Ok(row) = serde_json::from_slice::<Value>(&line) else { return Ok(kept) };
        if row.get("step").and_then(Value::as_u64).is_some_and(|step| step > last_step) {
            return Ok(kept);
        }
        kept = (kept.0 + count as u64, Some(row));
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;

    fn log_with(steps: std::ops::RangeInclusive<u64>, tail: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut log = RowLog::open(&path, None).unwrap();
        for step in steps {
            log.append(&json!({ "step": step, "loss": 0.5 })).unwrap();
        }
        log.sync().unwrap();
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(tail.as_bytes()).unwrap();
        (dir, path)
    }

    fn steps(path: &Path) -> Vec<u64> {
        fs::read_to_string(path)
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap()["step"].as_u64().unwrap())
            .collect()
    }

    #[test]
    fn resuming_leaves_exactly_one_row_per_step() {
        let (_dir, path) = log_with(1..=7, "");
        let mut log = RowLog::open(&path, Some(4)).unwrap();
        assert_eq!(log.last_row().unwrap()["step"], 4);
        log.append(&json!({ "step": 5 })).unwrap();
        assert_eq!(steps(&path), [1, 2, 3, 4, 5]);
    }

    #[test]
    fn a_torn_line_is_cut_off() {
        for tail in ["{\"step\": 4", "{\"step\": 4}", "\0\0\0\0", "{\"step\"\n"] {
            let (_dir, path) = log_with(1..=3, tail);
            RowLog::open(&path, Some(9)).unwrap().append(&json!({ "step": 4 })).unwrap();
            assert_eq!(steps(&path), [1, 2, 3, 4], "{tail:?}");
        }
    }

    #[test]
    fn a_fresh_start_keeps_nothing() {
        let (_dir, path) = log_with(1..=3, "");
        assert!(RowLog::open(&path, None).unwrap().last_row().is_none());
        assert_eq!(fs::read(&path).unwrap(), b"");
    }
}
