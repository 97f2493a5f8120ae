//! Bad files and rows give errors that name the file, the place and the remedy; nothing panics.

use std::path::Path;

use tandem_data::{FieldMap, OnBadRow, ReadOptions, read_rows};

use crate::support::file;

fn error(path: &Path) -> String {
    read_rows(path, &ReadOptions::default()).unwrap_err().to_string()
}

/// Asserts that a text holds all of the parts.
#[track_caller]
fn says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{text:?} does not say {part:?}");
    }
}

#[test]
fn a_missing_file_tells_what_is_there() {
    let (folder, _) = file("train.jsonl", "{}");
    says(&error(&folder.path().join("trian.jsonl")), &["trian.jsonl does not exist", "train.jsonl"]);
    says(&error(&folder.path().join("none/x.jsonl")), &["nor does its folder"]);
}

#[test]
fn folders_pipes_and_unknown_formats_are_refused() {
    let (folder, path) = file("rows.csv", "a,b");
    says(&error(&path), &["unknown data format", ".parquet"]);
    let inner = folder.path().join("inner.jsonl");
    std::fs::create_dir(&inner).unwrap();
    says(&error(&inner), &["is a folder"]);
    says(&error(Path::new("/dev/zero")), &["is a pipe or device"]);
}

#[test]
fn a_file_without_rows_is_an_error_in_every_format() {
    for name in ["a.jsonl", "a.json", "a.parquet", "a.arrow"] {
        let (_folder, path) = file(name, "");
        says(&error(&path), &["no usable rows", "empty"]);
    }
    let (_folder, path) = file("a.jsonl", "\n \r\n\n");
    says(&error(&path), &["no usable rows"]);
    let (_folder, path) = file("a.json", "[]");
    says(&error(&path), &["no usable rows"]);
}

#[test]
fn every_kind_of_bad_line_is_named() {
    let bad: &[(&[u8], &str)] = &[
        (b"{\"text\":", "cut at column"),
        (b"{\"text\":\"a", "cut at column"),
        (b"{\"text\" \"a\"}", "not JSON"),
        (b"{\"text\":\"a\"} x", "not JSON"),
        (b"{\"a\":1,\"a\":2}", "stands twice"),
        (b"{\"a\":{\"b\":1,\"b\":2}}", "stands twice"),
        (b"[1,2]", ".json file"),
        (b"[", ".json file"),
        (b"3", "a number where an object belongs"),
        (b"null", "null where an object belongs"),
        (b"{\"a\":NaN}", "not JSON"),
        (b"{\"a\":1e999}", "not JSON"),
        (b"{\"a\":\"\xc0\x80\"}", "not UTF-8 at byte 7"),
        (b"{\"a\":\"\xed\xa0\x80\"}", "not UTF-8 at byte 7"),
        (b"{\"a\":\"\xf0\x9f\x99\"}", "not UTF-8 at byte 7"),
        (b"\xff\xfe{\0}\0", "not UTF-8 at byte 1"),
        (b"{\"a\":\"\0\"}", "not JSON"),
        (b"{\"a\":\"\\ud800\"}", "not JSON"),
        (b"{'a': 1}", "not JSON"),
    ];
    for (line, reason) in bad {
        let content = [b"{\"text\":\"fine\"}\n", *line, b"\n"].concat();
        let (_folder, path) = file("a.jsonl", &content);
        says(&error(&path), &["a.jsonl:2", reason, "on_bad_row"]);
    }
    let deep = format!("{}1{}", "{\"a\":".repeat(500), "}".repeat(500));
    let (_folder, path) = file("a.jsonl", deep);
    says(&error(&path), &["a.jsonl:1", "recursion limit"]);
}

#[test]
fn a_line_without_end_is_a_bad_row_and_not_held_in_memory() {
    let mut content = vec![b'x'; 9 << 20];
    content.extend_from_slice(b"\n{\"text\":\"fine\"}\n");
    let (_folder, path) = file("a.jsonl", &content);
    says(&error(&path), &["a.jsonl:1", "longer than 8 MiB"]);
    let skip = ReadOptions { on_bad_row: OnBadRow::Skip, max_bad_fraction: 0.5 };
    assert_eq!(read_rows(&path, &skip).unwrap().rows.len(), 1);
}

#[test]
fn skipping_is_counted_and_bounded() {
    let content = "{\"text\":\"a\"}\n{bad\n{\"text\":\"b\"}\n{\"text\":\"c\"}\n";
    let (_folder, path) = file("a.jsonl", content);
    let read = |max_bad_fraction| read_rows(&path, &ReadOptions { on_bad_row: OnBadRow::Skip, max_bad_fraction });
    let rows = read(0.25).unwrap();
    assert_eq!((rows.rows.len(), rows.skipped), (3, 1));
    says(&read(0.2).unwrap_err().to_string(), &["1 of 4 rows are bad", "max_bad_fraction = 0.2", "a.jsonl:2"]);
    let (_folder, path) = file("b.jsonl", "{bad\n");
    let skip_all = ReadOptions { on_bad_row: OnBadRow::Skip, max_bad_fraction: 1.0 };
    says(&read_rows(&path, &skip_all).unwrap_err().to_string(), &["0 of 1 rows could be read"]);
}

#[test]
fn json_documents_of_other_shapes_are_refused() {
    for (content, reason) in [
        ("{\"rows\": []}", "without a list named \"data\""),
        ("3", "a number where a list"),
        ("[{\"a\":1}, 2]", "row 2"),
        ("{\"a\":1}\n{\"a\":2}", "name the file .jsonl"),
        ("[{\"a\":1},", "not JSON"),
    ] {
        let (_folder, path) = file("a.json", content);
        says(&error(&path), &["a.json", reason]);
    }
    let (_folder, path) = file("a.json", b"[\xff]");
    says(&error(&path), &["not UTF-8 at byte 2"]);
}

#[test]
fn unknown_keys_of_a_field_map_are_refused() {
    let error = serde_json::from_str::<FieldMap>("{\"promt\": \"q\"}").unwrap_err().to_string();
    says(&error, &["promt", "prompt"]);
}
