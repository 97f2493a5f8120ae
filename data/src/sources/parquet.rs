//! Parquet files, decoded a few rows at a time.

use std::path::Path;

use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder};

use super::columns::{self, Budget};
use super::{Collector, bounded, catch_panics, regular_file};
use crate::error::{DataError, Result};
use crate::limits;

pub(super) fn read(path: &Path, rows: &mut Collector<'_>) -> Result<()> {
    let (file, size) = regular_file(path)?;
    if size == 0 {
        return Ok(());
    }
    check_footer(path, &file, size)?;
    let decode = |place: String, reason: String| DataError::Decode { path: path.to_owned(), place, reason };
    catch_panics(path, || {
        // The Arrow schema that some writers embed can name types at will; the Parquet schema is enough.
        let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
        let metadata = ArrowReaderMetadata::load(&file, options).map_err(|e| decode("footer".into(), e.to_string()))?;
        columns::check_schema(metadata.schema()).map_err(|reason| decode("schema".into(), reason))?;
        let roots = metadata.schema().fields().iter().enumerate();
        let usable: Vec<usize> =
            roots.filter(|(_, field)| columns::supported(field.data_type())).map(|(root, _)| root).collect();
        let mut budget = Budget::for_file(size);
        let mut number = 0;
        for group in 0..metadata.metadata().num_row_groups() {
            let place = || format!("row group {group}");
            let clone = file.try_clone().map_err(|source| DataError::io(path, source))?;
            let reader = ParquetRecordBatchReaderBuilder::new_with_metadata(clone, metadata.clone());
            let reader = reader
                .with_projection(ProjectionMask::roots(metadata.parquet_schema(), usable.iter().copied()))
                .with_row_groups(vec![group])
                .with_batch_size(batch_rows(path, &metadata, group)?)
                .build()
                .map_err(|e| decode(place(), e.to_string()))?;
            for batch in reader {
                let batch = batch.map_err(|e| decode(place(), e.to_string()))?;
                for fields in columns::rows(&batch) {
                    number += 1;
                    if let Ok(fields) = &fields {
                        budget.spend(path, columns::weight(fields))?;
                    }
                    rows.row(number, fields)?;
                }
            }
        }
        Ok(())
    })
}

/// Checks the magic numbers and the footer's length before the footer is parsed.
fn check_footer(path: &Path, file: &std::fs::File, size: u64) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let decode =
        |reason: &str| DataError::Decode { path: path.to_owned(), place: "footer".into(), reason: reason.into() };
    if size < 12 {
        return Err(decode("too short for a Parquet file"));
    }
    let mut tail = [0; 8];
    file.read_exact_at(&mut tail, size - 8).map_err(|source| DataError::io(path, source))?;
    if &tail[4..] != b"PAR1" {
        return Err(decode("the end mark PAR1 is missing (a download cut short?)"));
    }
    let footer = u64::from(u32::from_le_bytes([tail[0], tail[1], tail[2], tail[3]]));
    bounded(path, "the Parquet footer, in bytes,", footer, limits::PARQUET_FOOTER_BYTES)?;
    if footer > size - 12 {
        return Err(decode("the footer is longer than the file"));
    }
    Ok(())
}

/// Rows per batch such that a batch stays near [`limits::BATCH_BYTES`] even if every row of a column repeats one dictionary
/// entry that is as large as the whole column chunk.
fn batch_rows(path: &Path, metadata: &ArrowReaderMetadata, group: usize) -> Result<usize> {
    let mut row_bytes = 0u64;
    for column in metadata.metadata().row_group(group).columns() {
        let declared = u64::try_from(column.uncompressed_size()).unwrap_or(u64::MAX);
        let what = format!("column {} of row group {group}, in bytes,", column.column_path());
        bounded(path, &what, declared, limits::COLUMN_CHUNK_BYTES)?;
        row_bytes += declared;
    }
    let rows = limits::BATCH_BYTES as u64 / row_bytes.max(1);
    Ok((rows as usize).clamp(1, limits::BATCH_ROWS))
}
