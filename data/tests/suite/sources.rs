//! The four formats hold the same rows.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use arrow::array::{
    ArrayRef, BooleanArray, Float64Array, Int64Array, ListArray, RecordBatch, StringArray, StructArray,
};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Fields, Schema};
use arrow::ipc::writer::{FileWriter, StreamWriter};
use parquet::arrow::ArrowWriter;
use serde_json::{Value, json};
use tandem_data::{ReadOptions, Rows, read_rows};

use crate::support::file;

fn batch() -> RecordBatch {
    let message =
        Fields::from(vec![Field::new("role", DataType::Utf8, false), Field::new("content", DataType::Utf8, true)]);
    let turns = StructArray::new(
        message.clone(),
        vec![
            Arc::new(StringArray::from(vec!["user", "assistant", "user"])) as ArrayRef,
            Arc::new(StringArray::from(vec![Some("hi"), Some("hello"), None])),
        ],
        None,
    );
    let item = Arc::new(Field::new_list_field(DataType::Struct(message), false));
    let messages = ListArray::new(item.clone(), OffsetBuffer::from_lengths([2, 0, 1]), Arc::new(turns), None);
    let schema = Schema::new(vec![
        Field::new("text", DataType::Utf8, true),
        Field::new("votes", DataType::Int64, false),
        Field::new("rating", DataType::Float64, false),
        Field::new("kept", DataType::Boolean, false),
        Field::new("messages", DataType::List(item), false),
    ]);
    let columns: Vec<ArrayRef> = vec![
        Arc::new(StringArray::from(vec![Some("naïve \u{2028} café"), None, Some("b")])),
        Arc::new(Int64Array::from(vec![-1, 0, i64::MAX])),
        Arc::new(Float64Array::from(vec![0.25, -3.0, 1e-300])),
        Arc::new(BooleanArray::from(vec![true, false, true])),
        Arc::new(messages),
    ];
    RecordBatch::try_new(Arc::new(schema), columns).unwrap()
}

fn expected() -> Vec<Value> {
    vec![
        json!({"text": "naïve \u{2028} café", "votes": -1, "rating": 0.25, "kept": true,
               "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}),
        json!({"text": null, "votes": 0, "rating": -3.0, "kept": false, "messages": []}),
        json!({"text": "b", "votes": i64::MAX, "rating": 1e-300, "kept": true,
               "messages": [{"role": "user", "content": null}]}),
    ]
}

fn read(path: &Path) -> Rows {
    read_rows(path, &ReadOptions::default()).unwrap()
}

fn values(rows: &Rows) -> Vec<Value> {
    rows.rows.iter().map(|row| Value::Object(row.fields.clone())).collect()
}

#[test]
fn every_format_gives_the_same_rows() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let lines: Vec<String> = expected().iter().map(Value::to_string).collect();
    std::fs::write(path("rows.jsonl"), lines.join("\n")).unwrap();
    std::fs::write(path("rows.ndjson"), lines.join("\r\n") + "\r\n\r\n").unwrap();
    std::fs::write(path("rows.json"), Value::Array(expected()).to_string()).unwrap();
    std::fs::write(path("wrapped.json"), json!({"version": 1, "data": expected()}).to_string()).unwrap();
    let batch = batch();
    let mut writer = ArrowWriter::try_new(File::create(path("rows.parquet")).unwrap(), batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    let mut writer = FileWriter::try_new(File::create(path("rows.feather")).unwrap(), &batch.schema()).unwrap();
    writer.write(&batch).unwrap();
    writer.finish().unwrap();
    let mut writer = StreamWriter::try_new(File::create(path("rows.arrow")).unwrap(), &batch.schema()).unwrap();
    writer.write(&batch).unwrap();
    writer.finish().unwrap();

    let digest = read(&path("rows.jsonl")).digest();
    for name in ["rows.jsonl", "rows.ndjson", "rows.json", "wrapped.json", "rows.parquet", "rows.feather", "rows.arrow"]
    {
        let rows = read(&path(name));
        assert_eq!(values(&rows), expected(), "{name}");
        assert_eq!(rows.digest(), digest, "{name}");
    }
}

#[test]
fn a_byte_order_mark_and_blank_lines_are_fine_and_lines_keep_their_numbers() {
    let (_folder, path) = file("a.jsonl", "\u{feff}{\"text\":\"one\"}\r\n\r\n   \n{\"text\":\"two\"}");
    let rows = read(&path);
    assert_eq!(rows.rows.len(), 2);
    assert!(rows.rows[1].origin.to_string().ends_with("a.jsonl:4"));
}

#[test]
fn columns_of_unknown_types_are_left_out() {
    let schema = Arc::new(Schema::new(vec![
        Field::new("text", DataType::Utf8, false),
        Field::new("raw", DataType::Binary, false),
    ]));
    let columns: Vec<ArrayRef> = vec![
        Arc::new(StringArray::from(vec!["a"])),
        Arc::new(arrow::array::BinaryArray::from(vec![b"\xff".as_slice()])),
    ];
    let batch = RecordBatch::try_new(schema.clone(), columns).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    let mut writer = ArrowWriter::try_new(File::create(&path).unwrap(), schema, None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    assert_eq!(values(&read(&path)), [json!({"text": "a"})]);
}

#[test]
fn several_row_groups_keep_their_order() {
    let schema = Arc::new(Schema::new(vec![Field::new("n", DataType::Int64, false)]));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    let mut writer = ArrowWriter::try_new(File::create(&path).unwrap(), schema.clone(), None).unwrap();
    for start in [0i64, 5_000, 10_000] {
        let column: ArrayRef = Arc::new(Int64Array::from_iter_values(start..start + 5_000));
        writer.write(&RecordBatch::try_new(schema.clone(), vec![column]).unwrap()).unwrap();
        writer.flush().unwrap();
    }
    writer.close().unwrap();
    let numbers: Vec<i64> = read(&path).rows.iter().map(|row| row.fields["n"].as_i64().unwrap()).collect();
    assert_eq!(numbers, (0..15_000).collect::<Vec<_>>());
}
