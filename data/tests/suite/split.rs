//! Phases and held-out rows.

use std::collections::HashMap;

use serde_json::json;
use tandem_data::{Part, Row, Split};

use crate::support::row;

fn rows(count: usize) -> Vec<Row> {
    (0..count).map(|n| row(json!({"text": format!("sentence {n}"), "rating": n % 9}))).collect()
}

#[test]
fn shares_are_kept_in_proportion() {
    let split = Split::parse("2,4,4", 0.1, 17).unwrap();
    let rows = rows(20_000);
    let mut counts: HashMap<Part, f64> = HashMap::new();
    for row in &rows {
        *counts.entry(split.part(row)).or_default() += 1.0;
    }
    for (phase, share) in [0.2, 0.4, 0.4].into_iter().enumerate() {
        for (eval, fraction) in [(true, 0.1), (false, 0.9)] {
            let expected = share * fraction * 20_000.0;
            let got = counts[&Part { phase, eval }];
            // Five standard deviations of a binomial count.
            assert!((got - expected).abs() < 5.0 * expected.sqrt(), "{phase} {eval}: {got} for {expected}");
        }
    }
}

#[test]
fn a_row_stays_where_it_is_when_others_come_or_go() {
    let split = Split::parse("2,4,4", 0.2, 1).unwrap();
    let rows = rows(500);
    let before: Vec<Part> = rows.iter().map(|row| split.part(row)).collect();
    let mut shuffled = rows.clone();
    shuffled.reverse();
    shuffled.truncate(400);
    for row in &shuffled {
        let at = rows.iter().position(|other| other == row).unwrap();
        assert_eq!(split.part(row), before[at]);
    }
}

#[test]
fn equal_rows_share_a_part_however_they_were_written() {
    let split = Split::parse("1,1,1", 0.5, 3).unwrap();
    for n in 0..200 {
        let one = row(serde_json::from_str(&format!("{{\"a\":{n},\"b\":\"x\"}}")).unwrap());
        let two = row(serde_json::from_str(&format!("{{\"b\":\"x\",\"a\":{n}}}")).unwrap());
        assert_eq!(split.part(&one), split.part(&two));
    }
}

#[test]
fn content_hashes_tell_alike_rows_apart() {
    let alike = [
        json!({"a": "b"}),
        json!({"a": ["b"]}),
        json!({"ab": ""}),
        json!({"a": "", "b": ""}),
        json!({"a": {"b": ""}}),
        json!({"a": 1}),
        json!({"a": "1"}),
        json!({"a": true}),
        json!({"a": null}),
        json!({"a": []}),
        json!({"a": {}}),
        json!({}),
    ];
    let hashes: std::collections::HashSet<_> = alike.iter().map(|fields| row(fields.clone()).content_hash(0)).collect();
    assert_eq!(hashes.len(), alike.len());
    assert_ne!(row(json!({"a": 1})).content_hash(0), row(json!({"a": 1})).content_hash(1));
}

#[test]
fn a_share_of_zero_is_an_empty_phase() {
    let split = Split::parse("0, 1", 0.0, 0).unwrap();
    assert!(rows(300).iter().all(|row| split.part(row) == Part { phase: 1, eval: false }));
}

#[test]
fn senseless_splits_are_refused() {
    for shares in ["", "a", "1,,2", "-1,2", "0,0", "1.5,2"] {
        let error = Split::parse(shares, 0.1, 0).unwrap_err().to_string();
        assert!(error.contains("2,4,4"), "{error}");
    }
    for fraction in [-0.1, 1.0, f64::NAN] {
        assert!(Split::new(vec![1], fraction, 0).unwrap_err().to_string().contains("eval_fraction"));
    }
}
