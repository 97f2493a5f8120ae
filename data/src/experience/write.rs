//! Rows to Parquet.

use std::io::Write;
use std::sync::Arc;

use arrow::array::{ArrayRef, ListArray, PrimitiveArray, RecordBatch, StringArray};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{ArrowPrimitiveType, Field, Float32Type, UInt32Type, UInt64Type};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;

use super::{ExperienceRow, schema};
use crate::error::{DataError, Result};

/// Rows per record batch and row group at most; bounds what a reader must hold at once.
const GROUP_ROWS: usize = 1_024;

/// The bytes of a Parquet file with these rows. The same rows give the same bytes.
///
/// # Errors
/// Lists of wrong length.
pub fn to_parquet(rows: &[ExperienceRow]) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    write_parquet(rows, &mut bytes)?;
    Ok(bytes)
}

/// Writes a Parquet file with these rows, for example into a file of a staging directory.
///
/// # Errors
/// Lists of wrong length; what the destination refuses.
pub fn write_parquet(rows: &[ExperienceRow], destination: impl Write + Send) -> Result<()> {
    let wrong = |reason: String| DataError::Experience { origin: "to be written".into(), reason };
    rows.iter().try_for_each(ExperienceRow::check).map_err(wrong)?;
    let level = ZstdLevel::try_new(1).map_err(|error| wrong(error.to_string()))?;
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(level))
        .set_max_row_group_row_count(Some(GROUP_ROWS))
        .set_created_by("tandem".into())
        .build();
    let mut writer =
        ArrowWriter::try_new(destination, schema(), Some(properties)).map_err(|error| wrong(error.to_string()))?;
    for group in rows.chunks(GROUP_ROWS) {
        let batch = batch(group).map_err(|error| wrong(error.to_string()))?;
        writer.write(&batch).map_err(|error| wrong(error.to_string()))?;
    }
    writer.close().map_err(|error| wrong(error.to_string()))?;
    Ok(())
}

fn batch(rows: &[ExperienceRow]) -> Result<RecordBatch, arrow::error::ArrowError> {
    fn column<T: ArrowPrimitiveType>(rows: &[ExperienceRow], value: impl Fn(&ExperienceRow) -> T::Native) -> ArrayRef {
        Arc::new(PrimitiveArray::<T>::from_iter_values(rows.iter().map(value)))
    }
    fn lists<T: ArrowPrimitiveType>(rows: &[ExperienceRow], list: impl Fn(&ExperienceRow) -> &[T::Native]) -> ArrayRef {
        let offsets = OffsetBuffer::from_lengths(rows.iter().map(|row| list(row).len()));
        let values = PrimitiveArray::<T>::from_iter_values(rows.iter().flat_map(|row| list(row).iter().copied()));
        Arc::new(ListArray::new(Arc::new(Field::new_list_field(T::DATA_TYPE, false)), offsets, Arc::new(values), None))
    }
    fn texts<'a>(rows: &'a [ExperienceRow], text: impl Fn(&'a ExperienceRow) -> &'a str) -> ArrayRef {
        Arc::new(StringArray::from_iter_values(rows.iter().map(text)))
    }
    RecordBatch::try_new(
        schema(),
        vec![
            column::<UInt64Type>(rows, |row| row.sample),
            column::<UInt32Type>(rows, |row| row.iteration),
            column::<UInt64Type>(rows, |row| row.policy_step),
            lists::<UInt32Type>(rows, |row| &row.prompt_ids),
            lists::<UInt32Type>(rows, |row| &row.response_ids),
            lists::<Float32Type>(rows, |row| &row.logp),
            lists::<Float32Type>(rows, |row| &row.ref_logp),
            lists::<Float32Type>(rows, |row| &row.value),
            column::<Float32Type>(rows, |row| row.score),
            texts(rows, |row| row.finish.as_str()),
            texts(rows, |row| &row.prompt_text),
            texts(rows, |row| &row.response_text),
        ],
    )
}
