//! The rows of a stage.

use tandem_data::blend::blend;
use tandem_data::order::permutation;
use tandem_data::{DataError, Located, ReadOptions, Row, Split, read_rows};

use crate::config::{Config, SourceConfig, Stage};
use crate::error::{Result, StageError};

/// The rows that a stage gets: of each source its share by content, some of them held out.
#[derive(Debug, Clone)]
pub struct StageRows {
    /// To train on, blended by the sources' weights; never empty.
    pub train: Vec<Located>,
    /// Held out, each once, in an order drawn from the seed, so that the first so many are a fair sample.
    pub eval: Vec<Located>,
    /// Digest of all rows of the sources that serve the stage (lower-case hex).
    pub digest: String,
}

/// The rows of one source that belong to the stage.
struct Part<'a> {
    source: &'a SourceConfig,
    train: Vec<Row>,
    eval: Vec<Row>,
}

/// Reads the sources of `stage` and takes its rows.
///
/// # Errors
/// Files and rows that cannot be used, and data that leaves the stage nothing to train on.
pub fn stage_rows(config: &Config, stage: Stage) -> Result<StageRows> {
    let options = ReadOptions { on_bad_row: config.data.on_bad_row, max_bad_fraction: config.data.max_bad_fraction };
    let mut digest = blake3::Hasher::new();
    let mut parts = Vec::new();
    for source in config.data.sources.iter().filter(|source| source.serves(stage)) {
        let read = read_rows(&source.path, &options)?;
        if read.skipped > 0 {
            tracing::warn!("{}: left out {} bad rows", source.path.display(), read.skipped);
        }
        digest.update(read.digest().as_bytes());
        parts.push(take(source, read.rows, config, stage)?);
    }
    let train = blended(&parts, config)?;
    if train.is_empty() {
        let reason = format!("no row is left to train {stage} on; raise its share in data.split, or add data");
        return Err(DataError::Setting { what: "data.sources".into(), reason }.into());
    }
    let held_out: Vec<(&SourceConfig, &Row)> =
        parts.iter().flat_map(|part| part.eval.iter().map(|row| (part.source, row))).collect();
    let order = permutation(config.run.seed, 0, held_out.len());
    let eval = order.into_iter().map(|at| locate(held_out[at].0, held_out[at].1)).collect::<Result<_>>()?;
    Ok(StageRows { train, eval, digest: digest.finalize().to_hex().to_string() })
}

/// The rows of a source that belong to `stage`, when only the stages that it serves share it.
fn take<'a>(source: &'a SourceConfig, rows: Vec<Row>, config: &Config, stage: Stage) -> Result<Part<'a>> {
    let mut shares = config.data.shares().ok_or_else(|| StageError::bug("data.split was not checked"))?;
    for other in Stage::ALL {
        if !source.serves(other) {
            shares[other.index()] = 0;
        }
    }
    let split = Split::new(shares.to_vec(), config.data.eval_fraction, config.run.seed)?;
    let mut part = Part { source, train: Vec::new(), eval: Vec::new() };
    for row in rows {
        let place = split.part(&row);
        if place.phase == stage.index() {
            let side = if place.eval { &mut part.eval } else { &mut part.train };
            side.push(row);
        }
    }
    Ok(part)
}

fn blended(parts: &[Part<'_>], config: &Config) -> Result<Vec<Located>> {
    let sizes: Vec<usize> = parts.iter().map(|part| part.train.len()).collect();
    let weights: Vec<Option<f64>> = parts.iter().map(|part| part.source.weight).collect();
    let picks = blend(&sizes, &weights, config.run.seed)?;
    picks.into_iter().map(|pick| locate(parts[pick.source].source, &parts[pick.source].train[pick.row])).collect()
}

fn locate(source: &SourceConfig, row: &Row) -> Result<Located> {
    Ok(Located { origin: row.origin.clone(), example: source.fields.example(row)? })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use tandem_data::Example;

    use super::*;
    use crate::testing::rated;

    fn texts(rows: &[Located]) -> BTreeSet<String> {
        let text = |row: &Located| match &row.example {
            Example::Text { text, .. } => text.clone(),
            other => panic!("{other:?}"),
        };
        rows.iter().map(text).collect()
    }

    #[test]
    fn every_row_has_one_place() {
        let dir = tempfile::tempdir().unwrap();
        let config = rated(dir.path(), 500, "");
        let mut all = BTreeSet::new();
        let mut count = 0;
        for stage in Stage::ALL {
            let rows = stage_rows(&config, stage).unwrap();
            assert!(!rows.eval.is_empty());
            for part in [&rows.train, &rows.eval] {
                count += part.len();
                all.extend(texts(part));
            }
        }
        assert_eq!((count, all.len()), (500, 500));
    }

    #[test]
    fn a_source_of_one_stage_is_not_shared() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = rated(dir.path(), 100, "");
        config.data.sources[0].stages = Some(vec![Stage::Reward]);
        let rows = stage_rows(&config, Stage::Reward).unwrap();
        assert_eq!(rows.train.len() + rows.eval.len(), 100);
        let error = stage_rows(&config, Stage::Sft).unwrap_err();
        assert_eq!(error.exit_code() as u8, 3, "{error}");
    }
}
