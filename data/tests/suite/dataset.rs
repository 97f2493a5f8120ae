//! Files to examples of a part.

use std::collections::BTreeSet;
use std::path::Path;

use tandem_data::dataset::{Dataset, Source};
use tandem_data::{Example, FieldMap, Part, ReadOptions, Split};

use crate::support::file;

fn source(path: &Path, weight: Option<f64>, text: &str) -> Source {
    let fields = FieldMap { text: Some(text.into()), ..FieldMap::default() };
    Source { path: path.to_owned(), weight, fields }
}

fn lines(field: &str, count: usize) -> String {
    (0..count).map(|n| format!("{{\"{field}\": \"{field} {n}\"}}\n")).collect()
}

fn texts(dataset: &Dataset, split: &Split, part: Part) -> Vec<String> {
    let text = |located: tandem_data::dataset::Located| match located.example {
        Example::Text { text, .. } => text,
        other => panic!("{other:?}"),
    };
    dataset.part(split, part, 5).unwrap().into_iter().map(text).collect()
}

#[test]
fn every_row_is_in_exactly_one_part() {
    let (_a, first) = file("a.jsonl", lines("one", 60));
    let (_b, second) = file("b.jsonl", lines("two", 40));
    let sources = [source(&first, None, "one"), source(&second, None, "two")];
    let dataset = Dataset::load(&sources, &ReadOptions::default()).unwrap();
    let split = Split::parse("1,1", 0.3, 2).unwrap();
    let parts = [0, 1].into_iter().flat_map(|phase| [true, false].map(|eval| Part { phase, eval }));
    let all: Vec<String> = parts.flat_map(|part| texts(&dataset, &split, part)).collect();
    assert_eq!(all.len(), 100);
    assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), 100);
}

#[test]
fn weights_shape_training_but_not_evaluation() {
    let (_a, first) = file("a.jsonl", lines("one", 300));
    let (_b, second) = file("b.jsonl", lines("two", 300));
    let sources = [source(&first, Some(3.0), "one"), source(&second, Some(1.0), "two")];
    let dataset = Dataset::load(&sources, &ReadOptions::default()).unwrap();
    let split = Split::parse("1", 0.5, 2).unwrap();
    let train = texts(&dataset, &split, Part { phase: 0, eval: false });
    let ones = train.iter().filter(|text| text.starts_with("one")).count();
    assert!((ones as f64 - 0.75 * train.len() as f64).abs() <= 1.0, "{ones} of {}", train.len());
    let eval = texts(&dataset, &split, Part { phase: 0, eval: true });
    assert_eq!(eval.iter().collect::<BTreeSet<_>>().len(), eval.len(), "held-out rows must come once");
}

#[test]
fn the_digest_follows_the_content() {
    let digest = |content: &str| {
        let (_folder, path) = file("a.jsonl", content);
        Dataset::load(&[source(&path, None, "x")], &ReadOptions::default()).unwrap().digest()
    };
    assert_eq!(digest("{\"x\": \"1\", \"y\": 2}"), digest("{\"y\": 2, \"x\": \"1\"}\n\n"));
    assert_ne!(digest("{\"x\": \"1\"}"), digest("{\"x\": \"2\"}"));
}

#[test]
fn empty_parts_and_no_sources_are_errors() {
    let (_folder, path) = file("a.jsonl", lines("x", 3));
    let dataset = Dataset::load(&[source(&path, None, "x")], &ReadOptions::default()).unwrap();
    let split = Split::parse("1,0", 0.0, 0).unwrap();
    let error = |part| dataset.part(&split, part, 0).unwrap_err().to_string();
    assert!(error(Part { phase: 1, eval: false }).contains("phase 1 (counted from 0) is empty"));
    assert!(error(Part { phase: 0, eval: true }).contains("held-out rows of phase 0"));
    assert!(Dataset::load(&[], &ReadOptions::default()).is_err());
}
