//! The list of what was published: names, lengths, digests, and what the bytes are about.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Result, StoreError};
use crate::names::check_file_name;

/// Name of the manifest inside a published directory.
pub const MANIFEST_NAME: &str = "manifest.json";
/// The manifest format this build writes, and the newest it reads.
pub const MANIFEST_FORMAT: u32 = 1;
/// Largest manifest that is read, in bytes.
pub(crate) const MAX_MANIFEST_BYTES: u64 = 16 << 20;

/// Stands in for the digest while the manifest's own text is digested.
const BLANK_DIGEST: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// One published file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Plain file name.
    pub name: String,
    /// Length in bytes.
    pub bytes: u64,
    /// BLAKE3 digest, 64 lower-case hexadecimal digits.
    pub blake3: String,
}

/// What a published directory holds.
///
/// On disk it is pretty-printed JSON. Its last field is the digest of the text itself, taken with that digest's own
/// digits set to zero: a flipped bit anywhere in the manifest, also in `meta`, is found.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`MANIFEST_FORMAT`] of the writer.
    pub format: u32,
    /// What was published, for example `checkpoint`.
    pub kind: String,
    /// The files, in the order they were written.
    pub files: Vec<FileEntry>,
    /// Counters, digests and whatever else the owner of the files wants to find again.
    pub meta: Value,
    /// Digest of this text.
    blake3: String,
}

impl Manifest {
    /// A manifest of the current format.
    pub(crate) fn new(kind: &str, files: Vec<FileEntry>, meta: Value) -> Self {
        Self { format: MANIFEST_FORMAT, kind: kind.to_owned(), files, meta, blake3: BLANK_DIGEST.to_owned() }
    }

    /// The text that goes to disk; `path` is where it goes, for messages.
    pub(crate) fn to_text(&self, path: &Path) -> Result<String> {
        let blank = serde_json::to_string_pretty(self)
            .map_err(|source| StoreError::Json { path: path.to_path_buf(), source })?;
        let digest = blake3::hash(blank.as_bytes()).to_hex();
        Ok(replace_last(&blank, BLANK_DIGEST, digest.as_str()).unwrap_or(blank))
    }

    /// Reads and checks a manifest's text; `dir` is the published directory, for messages.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] if the text is not what was written, [`StoreError::NewerFormat`] if a newer build wrote it.
    pub(crate) fn parse(text: &[u8], dir: &Path) -> Result<Self> {
        let path = dir.join(MANIFEST_NAME);
        let corrupt = |problem: String| StoreError::corrupt(&path, problem);
        let not_a_manifest = |error: serde_json::Error| corrupt(format!("not a manifest: {error}"));
        let text = std::str::from_utf8(text).map_err(|error| corrupt(format!("not UTF-8: {error}")))?;

        // These two fields keep their meaning in every format, so that damage is told apart from novelty.
        #[derive(Deserialize)]
        struct Frame {
            format: u32,
            blake3: String,
        }
        let frame: Frame = serde_json::from_str(text).map_err(not_a_manifest)?;
        let blank = (frame.blake3.len() == BLANK_DIGEST.len())
            .then(|| replace_last(text, &frame.blake3, BLANK_DIGEST))
            .flatten()
            .ok_or_else(|| corrupt("it has no digest of itself".to_owned()))?;
        if blake3::hash(blank.as_bytes()).to_hex().as_str() != frame.blake3 {
            return Err(corrupt("its text does not have the digest it states".to_owned()));
        }
        if frame.format > MANIFEST_FORMAT {
            return Err(StoreError::NewerFormat { path: dir.into(), found: frame.format, known: MANIFEST_FORMAT });
        }

        let manifest: Self = serde_json::from_str(text).map_err(not_a_manifest)?;
        for (index, file) in manifest.files.iter().enumerate() {
            check_file_name(&file.name).map_err(|error| corrupt(error.to_string()))?;
            if manifest.files[..index].iter().any(|earlier| earlier.name == file.name) {
                return Err(corrupt(format!("it lists {:?} twice", file.name)));
            }
        }
        Ok(manifest)
    }
}

/// `text` with the last `old` replaced by `new`. The digest is the last field, but `meta` may hold the same digits.
fn replace_last(text: &str, old: &str, new: &str) -> Option<String> {
    let at = text.rfind(old)?;
    Some(format!("{}{new}{}", &text[..at], &text[at + old.len()..]))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn sample() -> String {
        let entry = FileEntry { name: "a.bin".into(), bytes: 3, blake3: blake3::hash(b"abc").to_hex().to_string() };
        let meta = json!({ "step": 12, "loss": 0.125, "zeros": BLANK_DIGEST });
        Manifest::new("checkpoint", vec![entry], meta).to_text(Path::new("x")).unwrap()
    }

    #[test]
    fn round_trip() {
        let manifest = Manifest::parse(sample().as_bytes(), Path::new("x")).unwrap();
        assert_eq!(manifest.kind, "checkpoint");
        assert_eq!(manifest.files.len(), 1);
        assert_eq!(manifest.meta["step"], 12);
    }

    #[test]
    fn every_bit_flip_and_truncation_is_found() {
        let good = sample().into_bytes();
        for at in 0..good.len() {
            assert!(Manifest::parse(&good[..at], Path::new("x")).is_err(), "cut at {at}");
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                let found = Manifest::parse(&bad, Path::new("x"));
                assert!(matches!(found, Err(StoreError::Corrupt { .. })), "byte {at} bit {bit}");
            }
        }
    }

    #[test]
    fn a_newer_format_is_not_called_damaged() {
        let blank = format!(r#"{{"format": 99, "something": "new", "blake3": "{BLANK_DIGEST}"}}"#);
        let text = replace_last(&blank, BLANK_DIGEST, blake3::hash(blank.as_bytes()).to_hex().as_str()).unwrap();
        assert!(matches!(
            Manifest::parse(text.as_bytes(), Path::new("x")),
            Err(StoreError::NewerFormat { found: 99, known: 1, .. })
        ));
    }

    #[test]
    fn names_that_escape_are_refused() {
        let entry = FileEntry { name: "../x".into(), bytes: 0, blake3: BLANK_DIGEST.into() };
        let text = Manifest::new("checkpoint", vec![entry], Value::Null).to_text(Path::new("x")).unwrap();
        assert!(matches!(Manifest::parse(text.as_bytes(), Path::new("x")), Err(StoreError::Corrupt { .. })));
    }
}
