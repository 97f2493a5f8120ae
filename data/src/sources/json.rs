//! A JSON document: a list of objects, or an object whose `data` is such a list.

use std::path::Path;

use serde_json::Value;

use super::{Collector, read_bounded, strict};
use crate::error::{DataError, Result};
use crate::limits;

pub(super) fn read(path: &Path, rows: &mut Collector<'_>) -> Result<()> {
    let bytes = read_bounded(path, "the JSON document, in bytes,", limits::JSON_FILE_BYTES)?;
    let bad = |place: &str, reason: String| DataError::Decode { path: path.to_owned(), place: place.into(), reason };
    let text = std::str::from_utf8(&bytes)
        .map_err(|error| bad("document", format!("not UTF-8 at byte {}", error.valid_up_to() + 1)))?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if text.trim().is_empty() {
        return Ok(());
    }
    let document = strict::parse(text).map_err(|error| {
        let hint = if error.is_syntax() && error.to_string().contains("trailing characters") {
            " (one object per line? then name the file .jsonl)"
        } else {
            ""
        };
        bad("document", format!("not JSON: {error}{hint}"))
    })?;
    let items = match document {
        Value::Array(items) => items,
        Value::Object(mut fields) => match fields.remove("data") {
            Some(Value::Array(items)) => items,
            _ => return Err(bad("document", "an object without a list named \"data\"".into())),
        },
        other => return Err(bad("document", format!("{} where a list of objects belongs", strict::kind(&other)))),
    };
    for (index, item) in items.into_iter().enumerate() {
        let fields = match item {
            Value::Object(fields) => Ok(fields),
            other => Err(format!("{} where an object belongs", strict::kind(&other))),
        };
        rows.row(index as u64 + 1, fields)?;
    }
    Ok(())
}
