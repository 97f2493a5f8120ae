//! Arrow IPC: files (also called Feather) and streams, as the `datasets` library and polars write them.

use std::io::Cursor;
use std::path::Path;

use arrow::array::RecordBatch;
use arrow::datatypes::Schema;
use arrow::error::ArrowError;
use arrow::ipc::reader::{FileReader, StreamReader, read_footer_length};
use arrow::ipc::root_as_footer;

use super::columns::{self, Budget};
use super::{Collector, catch_panics, read_bounded};
use crate::error::{DataError, Result};
use crate::limits;

const FILE_MAGIC: &[u8] = b"ARROW1";

pub(super) fn read(path: &Path, rows: &mut Collector<'_>) -> Result<()> {
    let bytes = read_bounded(path, "the Arrow file, in bytes,", limits::ARROW_FILE_BYTES)?;
    if bytes.is_empty() {
        return Ok(());
    }
    let budget = Budget::for_file(bytes.len() as u64);
    let failed = |error: ArrowError| decode_error(path, "schema", error.to_string());
    catch_panics(path, || {
        if bytes.starts_with(FILE_MAGIC) {
            check_blocks(&bytes).map_err(|reason| decode_error(path, "footer", reason))?;
            let reader = FileReader::try_new(Cursor::new(&bytes), None).map_err(failed)?;
            let schema = reader.schema();
            read_batches(path, &schema, reader, budget, rows)
        } else if bytes.starts_with(b"FEA1") {
            Err(decode_error(path, "header", "Feather version 1; write it again as version 2 (Arrow IPC)".into()))
        } else {
            let reader = StreamReader::try_new(Cursor::new(&bytes), None).map_err(failed)?;
            let schema = reader.schema();
            read_batches(path, &schema, reader, budget, rows)
        }
    })
}

/// Checks that every block the footer lists lies inside the file: the reader allocates what a block claims before it reads it.
fn check_blocks(bytes: &[u8]) -> Result<(), String> {
    // … footer, its length (4 bytes), the magic again.
    let (rest, end) = bytes.split_last_chunk::<10>().ok_or("too short for an Arrow file")?;
    let length = read_footer_length(*end).map_err(|error| error.to_string())?;
    let start = rest.len().checked_sub(length).ok_or("the footer is longer than the file")?;
    let footer = root_as_footer(&rest[start..]).map_err(|error| error.to_string())?;
    let blocks = footer.recordBatches().into_iter().flatten().chain(footer.dictionaries().into_iter().flatten());
    for block in blocks {
        let parts = [block.offset(), i64::from(block.metaDataLength()), block.bodyLength()];
        let end = parts.into_iter().try_fold(0u64, |sum, part| sum.checked_add(u64::try_from(part).ok()?));
        if end.is_none_or(|end| end > bytes.len() as u64) {
            return Err("a record batch lies outside the file".into());
        }
    }
    Ok(())
}

fn read_batches(
    path: &Path,
    schema: &Schema,
    batches: impl Iterator<Item = Result<RecordBatch, ArrowError>>,
    mut budget: Budget,
    rows: &mut Collector<'_>,
) -> Result<()> {
    columns::check_schema(schema).map_err(|reason| decode_error(path, "schema", reason))?;
    let mut number = 0;
    for (index, batch) in batches.enumerate() {
        let batch = batch.map_err(|error| decode_error(path, &format!("batch {index}"), error.to_string()))?;
        for fields in columns::rows(&batch) {
            number += 1;
            if let Ok(fields) = &fields {
                budget.spend(path, columns::weight(fields))?;
            }
            rows.row(number, fields)?;
        }
    }
    Ok(())
}

fn decode_error(path: &Path, place: &str, reason: String) -> DataError {
    DataError::Decode { path: path.to_owned(), place: place.to_owned(), reason }
}
