//! Experience files.

use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch, UInt64Array};
use arrow::datatypes::{DataType, Field, Schema};
use parquet::arrow::ArrowWriter;
use tandem_data::experience::{ExperienceRow, Finish, read_parquet, schema, to_parquet};

use crate::support::{Random, file};

fn rows(count: usize) -> Vec<ExperienceRow> {
    let mut random = Random(11);
    let float = |random: &mut Random| f32::from_bits(random.below(usize::MAX) as u32);
    (0..count)
        .map(|n| {
            let tokens = 1 + random.below(6);
            let mut floats = || (0..tokens).map(|_| float(&mut random)).collect::<Vec<f32>>();
            ExperienceRow {
                sample: u64::MAX - n as u64,
                iteration: u32::MAX - n as u32,
                policy_step: n as u64,
                prompt_ids: (0..1 + n as u32 % 4).collect(),
                logp: floats(),
                ref_logp: floats(),
                value: floats(),
                response_ids: vec![u32::MAX; tokens],
                score: f32::from_bits(0x7fc0_1234 ^ n as u32),
                finish: [Finish::Eos, Finish::Length, Finish::Stop][n % 3],
                prompt_text: format!("prompt {n} 🙂"),
                response_text: if n % 5 == 0 { String::new() } else { "a\0b\n".into() },
            }
        })
        .collect()
}

/// Rows with floats as bits: NaNs must come back as they were.
fn bits(rows: &[ExperienceRow]) -> Vec<(Vec<u32>, ExperienceRow)> {
    let strip = |row: &ExperienceRow| {
        let floats = [&row.logp, &row.ref_logp, &row.value].into_iter().flatten().chain([&row.score]);
        let bits = floats.map(|number| number.to_bits()).collect();
        let empty = ExperienceRow { logp: vec![], ref_logp: vec![], value: vec![], score: 0.0, ..row.clone() };
        (bits, empty)
    };
    rows.iter().map(strip).collect()
}

#[test]
fn everything_comes_back_bit_for_bit() {
    for count in [1, 7, 3_000] {
        let rows = rows(count);
        let bytes = to_parquet(&rows).unwrap();
        assert_eq!(bytes, to_parquet(&rows).unwrap(), "the same rows must give the same bytes");
        let (_folder, path) = file("part-r0.parquet", &bytes);
        assert_eq!(bits(&read_parquet(&path).unwrap()), bits(&rows));
    }
}

#[test]
fn the_columns_are_those_of_the_design() {
    let names: Vec<String> = schema().fields().iter().map(|field| field.name().clone()).collect();
    assert_eq!(
        names.join(", "),
        "sample, iteration, policy_step, prompt_ids, response_ids, logp, ref_logp, value, score, finish, prompt_text, \
         response_text"
    );
}

#[test]
fn lists_must_fit_each_other() {
    let mut bad = rows(2);
    bad[1].value.push(0.0);
    let error = to_parquet(&bad).unwrap_err().to_string();
    assert!(error.contains("value has"), "{error}");
    let mut bad = rows(1);
    bad[0].prompt_ids.clear();
    assert!(to_parquet(&bad).unwrap_err().to_string().contains("must not be empty"));
}

#[test]
fn no_rows_make_a_file_without_rows() {
    let (_folder, path) = file("a.parquet", to_parquet(&[]).unwrap());
    assert_eq!(read_parquet(&path).unwrap(), []);
}

#[test]
fn foreign_files_are_refused() {
    let foreign = Arc::new(Schema::new(vec![Field::new("sample", DataType::UInt64, false)]));
    let column: ArrayRef = Arc::new(UInt64Array::from(vec![1]));
    let mut bytes = Vec::new();
    let mut writer = ArrowWriter::try_new(&mut bytes, foreign.clone(), None).unwrap();
    writer.write(&RecordBatch::try_new(foreign, vec![column]).unwrap()).unwrap();
    writer.close().unwrap();
    let (_folder, path) = file("a.parquet", &bytes);
    let error = read_parquet(&path).unwrap_err().to_string();
    assert!(error.contains("a.parquet") && error.contains("the column iteration is missing"), "{error}");
    assert!(read_parquet(path.with_file_name("b.parquet")).unwrap_err().to_string().contains("does not exist"));
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = to_parquet(&rows(5)).unwrap();
    for length in (0..bytes.len()).step_by(7) {
        let (_folder, path) = file("a.parquet", &bytes[..length]);
        assert!(read_parquet(&path).is_err(), "{length} of {} bytes passed", bytes.len());
    }
}
