//! One row of a data file, and the place it came from, so that whatever is found wrong with it later can be found again.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

/// Where a row stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    file: Arc<Path>,
    place: Place,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Line(u64),
    Row(u64),
}

impl Origin {
    /// A line of a text file, counted from 1.
    pub fn line(file: &Arc<Path>, line: u64) -> Self {
        Self { file: Arc::clone(file), place: Place::Line(line) }
    }

    /// A row of a file without lines, counted from 1.
    pub fn row(file: &Arc<Path>, row: u64) -> Self {
        Self { file: Arc::clone(file), place: Place::Row(row) }
    }

    /// The file.
    pub fn file(&self) -> &Path {
        &self.file
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.place {
            Place::Line(line) => write!(f, "{}:{line}", self.file.display()),
            Place::Row(row) => write!(f, "{} row {row}", self.file.display()),
        }
    }
}

/// The fields of a row, as JSON values.
pub type Fields = serde_json::Map<String, serde_json::Value>;

/// One row: its fields and where it stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Field name → value.
    pub fields: Fields,
    /// Where the row stands.
    pub origin: Origin,
}

impl Row {
    /// A digest of the row's content and of nothing else: equal rows have equal digests wherever they stand and in
    /// whatever order their fields were written.
    pub fn content_hash(&self, seed: u64) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"tandem row");
        hasher.update(&seed.to_le_bytes());
        hash_object(&mut hasher, &self.fields);
        *hasher.finalize().as_bytes()
    }
}

/// Feeds a value so that no two different values feed the same bytes: a tag, then a length, then the content.
fn hash_value(hasher: &mut blake3::Hasher, value: &serde_json::Value) {
    use serde_json::Value;
    match value {
        Value::Null => {
            hasher.update(b"n");
        }
        Value::Bool(bool) => {
            hasher.update(if *bool { b"t" } else { b"f" });
        }
        Value::Number(number) => hash_text(hasher, b'd', &number.to_string()),
        Value::String(text) => hash_text(hasher, b's', text),
        Value::Array(values) => {
            hasher.update(b"a");
            hasher.update(&(values.len() as u64).to_le_bytes());
            values.iter().for_each(|value| hash_value(hasher, value));
        }
        Value::Object(fields) => hash_object(hasher, fields),
    }
}

fn hash_object(hasher: &mut blake3::Hasher, fields: &Fields) {
    // The map may or may not keep insertion order, depending on features other crates switch on.
    let mut sorted: Vec<_> = fields.iter().collect();
    sorted.sort_by_key(|(name, _)| name.as_str());
    hasher.update(b"o");
    hasher.update(&(sorted.len() as u64).to_le_bytes());
    for (name, value) in sorted {
        hash_text(hasher, b'k', name);
        hash_value(hasher, value);
    }
}

fn hash_text(hasher: &mut blake3::Hasher, tag: u8, text: &str) {
    hasher.update(&[tag]);
    hasher.update(&(text.len() as u64).to_le_bytes());
    hasher.update(text.as_bytes());
}
