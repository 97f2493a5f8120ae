//! The header of a safetensors file, read with distrust: every length is checked before anything is allocated for it.
//!
//! Format: 8 bytes of header length (little endian), a JSON object `name → {dtype, shape, data_offsets}` of that length,
//! then the data, without holes.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use super::files::open;
use crate::{Error, Result};

/// Longest header; a 400-billion-parameter model's has 0.2 MiB.
const HEADER_LIMIT: u64 = 16 << 20;
const TENSOR_LIMIT: usize = 65_536;
const RANK_LIMIT: usize = 8;
const NAME_LIMIT: usize = 512;

/// An element type of a safetensors file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dtype {
    F32,
    F16,
    Bf16,
    /// One that no weight has, of so many bytes: old folders store masks and tables beside the weights.
    Other(u64),
}

impl Dtype {
    fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "F32" => Dtype::F32,
            "F16" => Dtype::F16,
            "BF16" => Dtype::Bf16,
            "BOOL" | "U8" | "I8" | "F8_E4M3" | "F8_E5M2" => Dtype::Other(1),
            "U16" | "I16" => Dtype::Other(2),
            "U32" | "I32" => Dtype::Other(4),
            "U64" | "I64" | "F64" => Dtype::Other(8),
            _ => return None,
        })
    }

    /// Bytes per element.
    pub(crate) fn size(self) -> u64 {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
            Dtype::Other(size) => size,
        }
    }
}

/// One tensor of a file.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    /// Its name.
    pub(crate) name: String,
    /// Its element type.
    pub(crate) dtype: Dtype,
    /// Its shape.
    pub(crate) shape: Vec<usize>,
    /// Its first byte in the file.
    pub(crate) start: u64,
}

/// Opens a safetensors file and reads what is in it.
///
/// # Errors
/// If the file is not whole and consistent, naming it.
pub(crate) fn read(path: &Path) -> Result<(File, Vec<Stored>)> {
    let (mut file, length) = open(path)?;
    let wrong = |reason: String| {
        Error::model_file(path, reason, "get the file anew; if it is a pickle, convert it to safetensors")
    };
    let mut prefix = [0u8; 8];
    if length < 8 {
        return Err(wrong(format!("it has {length} bytes, too few for a safetensors file")));
    }
    file.read_exact(&mut prefix).map_err(|error| Error::io(path, error))?;
    let header_length = u64::from_le_bytes(prefix);
    if header_length > HEADER_LIMIT || header_length > length - 8 {
        return Err(wrong(format!(
            "it is cut short or no safetensors file: a header of {header_length} bytes in {length}"
        )));
    }
    let mut header = vec![0u8; header_length as usize];
    file.read_exact(&mut header).map_err(|error| Error::io(path, error))?;
    let mut json = serde_json::Deserializer::from_slice(&header);
    let parsed = json.deserialize_map(Entries).and_then(|entries| json.end().map(|()| entries));
    let entries = parsed.map_err(|error| wrong(format!("its header is not valid: {error}")))?;
    let data = 8 + header_length;
    let tensors = check(entries, length - data, data).map_err(wrong)?;
    Ok((file, tensors))
}

/// Checks names, shapes, types and offsets against the `bytes` of data that begin at `data`.
fn check(mut entries: Vec<(String, Entry)>, bytes: u64, data: u64) -> std::result::Result<Vec<Stored>, String> {
    entries.sort_by(|(a, x), (b, y)| (x.data_offsets, a).cmp(&(y.data_offsets, b)));
    let mut end = 0;
    let mut tensors = Vec::with_capacity(entries.len());
    let mut seen = std::collections::HashSet::new();
    for (name, Entry { dtype, shape, data_offsets: [first, last] }) in entries {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-' | '/');
        if name.is_empty() || name.len() > NAME_LIMIT || !name.chars().all(plain) {
            let shown: String = name.chars().take(64).collect();
            return Err(format!("a tensor has the unusual name {shown:?}"));
        }
        let Some(dtype) = Dtype::parse(&dtype) else {
            let shown: String = dtype.chars().take(16).collect();
            return Err(format!("{name} has the unknown dtype {shown:?}"));
        };
        if shape.len() > RANK_LIMIT {
            return Err(format!("{name} has {} dimensions; at most {RANK_LIMIT} are supported", shape.len()));
        }
        let size = shape.iter().try_fold(dtype.size(), |size, &n| size.checked_mul(n));
        if first != end || last < first || size != Some(last - first) {
            return Err(format!(
                "the offsets {first}..{last} of {name} do not fit its shape {shape:?} or its neighbours"
            ));
        }
        end = last;
        // Each dimension is at most the number of bytes, unless another is 0; such a tensor fits no parameter.
        let shape = shape.iter().map(|&n| usize::try_from(n).unwrap_or(usize::MAX)).collect();
        if !seen.insert(name.clone()) {
            return Err(format!("{name} is in it twice"));
        }
        tensors.push(Stored { name, dtype, shape, start: data + first });
    }
    if end != bytes {
        return Err(format!("it is cut short or too long: its tensors need {end} bytes, there are {bytes}"));
    }
    Ok(tensors)
}

/// One tensor as the header has it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// Collects the entries of the header one by one, so that their number is bounded and a name that stands there twice shows.
struct Entries;

impl<'de> Visitor<'de> for Entries {
    type Value = Vec<(String, Entry)>;

    fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self::Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
            } else if entries.len() == TENSOR_LIMIT {
                return Err(serde::de::Error::custom(format!("it has more than {TENSOR_LIMIT} tensors")));
            } else {
                entries.push((name, map.next_value()?));
            }
        }
        Ok(entries)
    }
}
