//! A run's data: several files, divided and mixed.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::blend::blend;
use crate::error::{DataError, Result};
use crate::example::Example;
use crate::fields::FieldMap;
use crate::row::{Origin, Row};
use crate::sources::{ReadOptions, read_rows};
use crate::split::{Part, Split};

/// One file of the data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// The file.
    pub path: PathBuf,
    /// Its share of the mixture relative to the other files; `None` for all files: every row once.
    #[serde(default)]
    pub weight: Option<f64>,
    /// Which field is which.
    #[serde(default)]
    pub fields: FieldMap,
}

/// The rows of all sources.
#[derive(Debug, Clone)]
pub struct Dataset {
    sources: Vec<Loaded>,
}

#[derive(Debug, Clone)]
struct Loaded {
    source: Source,
    rows: Vec<Row>,
    digest: String,
}

/// An example and the row it came from.
#[derive(Debug, Clone, PartialEq)]
pub struct Located {
    /// Where the row stands.
    pub origin: Origin,
    /// What it says.
    pub example: Example,
}

impl Dataset {
    /// Reads all sources.
    ///
    /// # Errors
    /// No source, or what [`read_rows`] finds.
    pub fn load(sources: &[Source], options: &ReadOptions) -> Result<Self> {
        if sources.is_empty() {
            let reason = "there is none; name at least one file with its path".into();
            return Err(DataError::Setting { what: "data sources".into(), reason });
        }
        let load = |source: &Source| {
            let rows = read_rows(&source.path, options)?;
            Ok(Loaded { source: source.clone(), digest: rows.digest(), rows: rows.rows })
        };
        Ok(Self { sources: sources.iter().map(load).collect::<Result<_>>()? })
    }

    /// A digest of all rows in their order; it changes with the data, not with where the files lie.
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for loaded in &self.sources {
            hasher.update(loaded.digest.as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }

    /// The examples of a part. Training parts are mixed by the sources' weights ([`blend`]); of held-out parts every row comes
    /// once, in the files' order.
    ///
    /// # Errors
    /// A part without rows, rows whose fields do not fit, weights that make no sense.
    pub fn part(&self, split: &Split, part: Part, seed: u64) -> Result<Vec<Located>> {
        let rows: Vec<Vec<&Row>> = self.sources.iter().map(|loaded| split.select(&loaded.rows, part)).collect();
        if rows.iter().all(Vec::is_empty) {
            let held_out = if part.eval { "held-out rows of " } else { "" };
            let reason = format!(
                "{held_out}phase {} (counted from 0) is empty; give it a larger share, a larger eval_fraction, or more data",
                part.phase
            );
            return Err(DataError::Setting { what: "split".into(), reason });
        }
        let locate = |source: usize, row: &Row| {
            let example = self.sources[source].source.fields.example(row)?;
            Ok(Located { origin: row.origin.clone(), example })
        };
        if part.eval {
            let all = rows.iter().enumerate().flat_map(|(source, rows)| rows.iter().map(move |row| (source, *row)));
            return all.map(|(source, row)| locate(source, row)).collect();
        }
        let sizes: Vec<usize> = rows.iter().map(Vec::len).collect();
        let weights: Vec<Option<f64>> = self.sources.iter().map(|loaded| loaded.source.weight).collect();
        blend(&sizes, &weights, seed)?
            .into_iter()
            .map(|pick| locate(pick.source, rows[pick.source][pick.row]))
            .collect()
    }
}
