//! Damaged and hostile Parquet and Arrow files.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{ArrayRef, DictionaryArray, Int32Array, RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, Int32Type, Schema};
use arrow::ipc::writer::FileWriter;
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::properties::WriterProperties;
use tandem_data::{ReadOptions, read_rows};

fn batch(rows: usize) -> RecordBatch {
    let schema = Schema::new(vec![Field::new("text", DataType::Utf8, true), Field::new("n", DataType::Int32, false)]);
    let texts: Vec<Option<String>> = (0..rows).map(|n| (n % 5 != 0).then(|| format!("row {n}"))).collect();
    let columns: Vec<ArrayRef> =
        vec![Arc::new(StringArray::from(texts)), Arc::new(Int32Array::from_iter_values(0..rows as i32))];
    RecordBatch::try_new(Arc::new(schema), columns).unwrap()
}

fn parquet_bytes() -> Vec<u8> {
    let batch = batch(20);
    let mut bytes = Vec::new();
    let mut writer = ArrowWriter::try_new(&mut bytes, batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    bytes
}

fn arrow_bytes() -> Vec<u8> {
    let batch = batch(20);
    let mut bytes = Vec::new();
    let mut writer = FileWriter::try_new(&mut bytes, &batch.schema()).unwrap();
    writer.write(&batch).unwrap();
    writer.finish().unwrap();
    drop(writer);
    bytes
}

/// Reads every truncation and every single-bit flip of a file. Each must end in an error or in rows, soon, without a panic.
fn survive(name: &str, bytes: &[u8]) -> (usize, usize) {
    let (_folder, path) = crate::support::file(name, bytes);
    // Changed in place: some file systems flush a file that is written anew.
    let file = File::options().write(true).open(&path).unwrap();
    let fails = || {
        let start = Instant::now();
        let result = read_rows(&path, &ReadOptions::default());
        assert!(start.elapsed() < Duration::from_secs(5));
        if let Err(error) = &result {
            assert!(error.to_string().contains(name), "{error}");
        }
        result.is_err()
    };
    let mut flips = 0;
    for (at, &byte) in bytes.iter().enumerate() {
        for bit in 0..8 {
            file.write_all_at(&[byte ^ 1 << bit], at as u64).unwrap();
            flips += usize::from(fails());
        }
        file.write_all_at(&[byte], at as u64).unwrap();
    }
    let mut truncations = 0;
    for length in (0..bytes.len()).rev() {
        file.set_len(length as u64).unwrap();
        truncations += usize::from(fails());
    }
    (truncations, flips)
}

#[test]
fn every_damage_to_a_parquet_file_is_survived() {
    let bytes = parquet_bytes();
    let (truncations, flips) = survive("a.parquet", &bytes);
    assert_eq!(truncations, bytes.len(), "a cut Parquet file must never pass");
    assert!(flips > bytes.len(), "only {flips} flips were noticed");
}

#[test]
fn every_damage_to_an_arrow_file_is_survived() {
    let bytes = arrow_bytes();
    let (truncations, flips) = survive("a.arrow", &bytes);
    assert_eq!(truncations, bytes.len(), "a cut Arrow file must never pass");
    assert!(flips > bytes.len() / 2, "only {flips} flips were noticed");
}

#[test]
fn a_small_file_that_decodes_to_gigabytes_is_stopped() {
    let huge = "x".repeat(16 << 20);
    let keys = Int32Array::from(vec![0; 40]);
    let column: ArrayRef = Arc::new(
        DictionaryArray::<Int32Type>::try_new(keys, Arc::new(StringArray::from(vec![huge.as_str()]))).unwrap(),
    );
    let schema = Arc::new(Schema::new(vec![Field::new("text", column.data_type().clone(), false)]));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bomb.parquet");
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(Default::default()))
        .set_dictionary_page_size_limit(64 << 20)
        .build();
    let mut writer = ArrowWriter::try_new(File::create(&path).unwrap(), schema.clone(), Some(properties)).unwrap();
    writer.write(&RecordBatch::try_new(schema, vec![column]).unwrap()).unwrap();
    writer.close().unwrap();
    let size = std::fs::metadata(&path).unwrap().len();
    assert!(size < 100_000, "{size} bytes: not the bomb this test is about");
    let error = read_rows(&path, &ReadOptions::default()).unwrap_err().to_string();
    assert!(error.contains("decodes to") && error.contains("limit"), "{error}");
}

#[test]
fn a_pickle_named_parquet_is_refused() {
    let (_folder, path) = crate::support::file("a.parquet", b"\x80\x04\x95 not a parquet file at all");
    let error = read_rows(&path, &ReadOptions::default()).unwrap_err().to_string();
    assert!(error.contains("PAR1"), "{error}");
}

#[test]
fn a_footer_longer_than_the_file_is_refused() {
    let mut bytes = parquet_bytes();
    let at = bytes.len() - 8;
    bytes[at..at + 4].copy_from_slice(&(12u32 << 20).to_le_bytes());
    let (_folder, path) = crate::support::file("a.parquet", &bytes);
    let error = read_rows(&path, &ReadOptions::default()).unwrap_err().to_string();
    assert!(error.contains("footer is longer"), "{error}");
}
