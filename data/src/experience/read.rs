//! Parquet to rows.

use std::fs::File;
use std::path::Path;

use arrow::array::{AsArray, RecordBatch};
use arrow::datatypes::{ArrowPrimitiveType, DataType, Float32Type, UInt32Type, UInt64Type};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use super::{ExperienceRow, Finish, schema};
use crate::error::{DataError, Result};
use crate::limits;
use crate::sources::{bounded, catch_panics, regular_file};

/// Reads an experience file. A published one has been checked against its digest before; this guards what the digest
/// cannot know: that the columns are those of [`schema`] and the lists fit each other.
///
/// # Errors
/// A missing or damaged file, other columns, nulls, lists of wrong length, an unknown `finish`.
pub fn read_parquet(path: impl AsRef<Path>) -> Result<Vec<ExperienceRow>> {
    let path = path.as_ref();
    let (file, _) = regular_file(path)?;
    catch_panics(path, || read(path, file))
}

fn read(path: &Path, file: File) -> Result<Vec<ExperienceRow>> {
    let wrong = |reason: String| DataError::Experience { origin: path.display().to_string(), reason };
    let reader = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|error| wrong(error.to_string()))?;
    check_columns(reader.schema()).map_err(wrong)?;
    let count = u64::try_from(reader.metadata().file_metadata().num_rows()).unwrap_or(u64::MAX);
    bounded(path, "the number of rows", count, limits::ROWS as u64)?;
    let reader = reader.with_batch_size(limits::BATCH_ROWS).build().map_err(|error| wrong(error.to_string()))?;
    let mut rows = Vec::new();
    for batch in reader {
        let batch = batch.map_err(|error| wrong(error.to_string()))?;
        append(&batch, &mut rows).map_err(wrong)?;
    }
    Ok(rows)
}

fn check_columns(found: &arrow::datatypes::Schema) -> Result<(), String> {
    for column in schema().fields() {
        let field =
            found.field_with_name(column.name()).map_err(|_| format!("the column {} is missing", column.name()))?;
        let same = match (field.data_type(), column.data_type()) {
            (DataType::List(found), DataType::List(wanted)) => found.data_type() == wanted.data_type(),
            (found, wanted) => found == wanted,
        };
        if !same {
            return Err(format!("the column {} is {}, not {}", column.name(), field.data_type(), column.data_type()));
        }
    }
    Ok(())
}

fn append(batch: &RecordBatch, rows: &mut Vec<ExperienceRow>) -> Result<(), String> {
    let batch = Columns::new(batch)?;
    for row in 0..batch.0.num_rows() {
        let finish = batch.text("finish", row)?;
        let finish =
            Finish::parse(&finish).ok_or_else(|| format!("row {}: unknown finish {finish:?}", rows.len() + 1))?;
        let row = ExperienceRow {
            sample: batch.number::<UInt64Type>("sample", row)?,
            iteration: batch.number::<UInt32Type>("iteration", row)?,
            policy_step: batch.number::<UInt64Type>("policy_step", row)?,
            prompt_ids: batch.list::<UInt32Type>("prompt_ids", row)?,
            response_ids: batch.list::<UInt32Type>("response_ids", row)?,
            logp: batch.list::<Float32Type>("logp", row)?,
            ref_logp: batch.list::<Float32Type>("ref_logp", row)?,
            value: batch.list::<Float32Type>("value", row)?,
            score: batch.number::<Float32Type>("score", row)?,
            finish,
            prompt_text: batch.text("prompt_text", row)?,
            response_text: batch.text("response_text", row)?,
        };
        row.check().map_err(|reason| format!("row {}: {reason}", rows.len() + 1))?;
        rows.push(row);
    }
    Ok(())
}

/// A batch whose columns have no nulls.
struct Columns<'a>(&'a RecordBatch);

impl<'a> Columns<'a> {
    fn new(batch: &'a RecordBatch) -> Result<Self, String> {
        match batch.schema().fields().iter().zip(batch.columns()).find(|(_, column)| column.null_count() > 0) {
            Some((field, _)) => Err(format!("the column {} has nulls", field.name())),
            None => Ok(Self(batch)),
        }
    }

    fn column(&self, name: &str) -> Result<&'a arrow::array::ArrayRef, String> {
        self.0.column_by_name(name).ok_or_else(|| format!("the column {name} is missing"))
    }

    fn number<T: ArrowPrimitiveType>(&self, name: &str, row: usize) -> Result<T::Native, String> {
        Ok(self.column(name)?.as_primitive::<T>().value(row))
    }

    fn list<T: ArrowPrimitiveType>(&self, name: &str, row: usize) -> Result<Vec<T::Native>, String> {
        let items = self.column(name)?.as_list::<i32>().value(row);
        if items.null_count() > 0 {
            return Err(format!("the column {name} has nulls in its lists"));
        }
        Ok(items.as_primitive::<T>().values().to_vec())
    }

    fn text(&self, name: &str, row: usize) -> Result<String, String> {
        Ok(self.column(name)?.as_string::<i32>().value(row).to_owned())
    }
}
