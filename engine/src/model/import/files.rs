//! The files of a model folder: which there are, and reading them within bounds.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::header::{self, Stored};
use crate::{Error, Result};

/// Longest `config.json`.
const CONFIG_LIMIT: u64 = 1 << 20;
/// Longest `model.safetensors.index.json`.
const INDEX_LIMIT: u64 = 16 << 20;
const SHARD_LIMIT: usize = 4_096;
const SHARD_NAME_LIMIT: usize = 128;

/// The weights of a folder in one file.
const WEIGHTS: &str = "model.safetensors";
/// The list of files where they are in several.
const INDEX: &str = "model.safetensors.index.json";

/// The tensors of one file.
pub(crate) struct Shard {
    /// Where it is.
    pub(crate) path: PathBuf,
    /// The open file.
    pub(crate) file: File,
    /// What is in it.
    pub(crate) tensors: Vec<Stored>,
}

/// Opens a regular file; returns its length with it. Devices and pipes could keep a reader for ever.
pub(crate) fn open(path: &Path) -> Result<(File, u64)> {
    let metadata = path.metadata().map_err(|error| match error.kind() {
        ErrorKind::NotFound => Error::model_file(path, "there is no such file", "check the path"),
        _ => Error::io(path, error),
    })?;
    if !metadata.is_file() {
        return Err(Error::model_file(path, "it is not a regular file", "check the path"));
    }
    let file = File::open(path).map_err(|error| Error::io(path, error))?;
    Ok((file, metadata.len()))
}

/// Reads the JSON file `path` of at most `limit` bytes.
pub(crate) fn read_json<T: serde::de::DeserializeOwned>(path: &Path, limit: u64) -> Result<T> {
    let (file, length) = open(path)?;
    let mut text = Vec::new();
    file.take(limit + 1).read_to_end(&mut text).map_err(|error| Error::io(path, error))?;
    if text.len() as u64 > limit {
        return Err(Error::model_file(
            path,
            format!("it has {length} bytes, more than {limit}"),
            "check that it is the right file",
        ));
    }
    serde_json::from_slice(&text).map_err(|error| {
        Error::model_file(path, format!("it is not the JSON it should be: {error}"), "get the file anew")
    })
}

/// Reads a folder's `config.json`.
pub(crate) fn read_config(folder: &Path) -> Result<(PathBuf, Value)> {
    let path = folder.join("config.json");
    if !path.exists() {
        return Err(Error::model_file(
            folder,
            "it has no config.json, so it is no model folder",
            "name a folder that transformers has saved, or a .gguf file",
        ));
    }
    let config = read_json(&path, CONFIG_LIMIT)?;
    Ok((path, config))
}

/// Opens the weights of a folder.
pub(crate) fn open_weights(folder: &Path) -> Result<Vec<Shard>> {
    let single = folder.join(WEIGHTS);
    if single.exists() {
        let (file, tensors) = header::read(&single)?;
        return Ok(vec![Shard { path: single, file, tensors }]);
    }
    let index = folder.join(INDEX);
    if index.exists() { open_shards(folder, &index) } else { Err(no_weights(folder)) }
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

fn open_shards(folder: &Path, index: &Path) -> Result<Vec<Shard>> {
    let Index { weight_map } = read_json(index, INDEX_LIMIT)?;
    let wrong = |reason: String| Error::model_file(index, reason, "get the folder anew");
    let names: BTreeSet<&String> = weight_map.values().collect();
    if names.len() > SHARD_LIMIT {
        return Err(wrong(format!("it names {} files; at most {SHARD_LIMIT} are supported", names.len())));
    }
    // A hub's cache links each file to a store elsewhere, so a link is no reason to refuse; a path is.
    if let Some(name) = names.iter().find(|name| !is_plain(name)) {
        let shown: String = name.chars().take(64).collect();
        return Err(wrong(format!("it names the file {shown:?}, which is not a plain name that ends in .safetensors")));
    }
    let mut shards: Vec<Shard> = Vec::with_capacity(names.len());
    let mut place: HashMap<String, usize> = HashMap::new();
    for name in &names {
        let path = folder.join(name);
        let (file, tensors) = header::read(&path)?;
        for tensor in &tensors {
            if let Some(other) = place.insert(tensor.name.clone(), shards.len()) {
                return Err(wrong(format!(
                    "{} is both in {} and in {name}",
                    tensor.name,
                    shards[other].path.display()
                )));
            }
        }
        shards.push(Shard { path, file, tensors });
    }
    for (tensor, name) in &weight_map {
        let found = place.get(tensor).map(|&shard| &shards[shard].path);
        if found != Some(&folder.join(name)) {
            return Err(wrong(format!("it says that {tensor} is in {name}, which is not so")));
        }
    }
    Ok(shards)
}

/// Whether `name` is one component that ends in `.safetensors`.
fn is_plain(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    name.len() <= SHARD_NAME_LIMIT
        && name.ends_with(".safetensors")
        && !name.starts_with('.')
        && name.chars().all(allowed)
}

/// Says what a folder has instead of safetensors weights.
fn no_weights(folder: &Path) -> Error {
    let entries = folder.read_dir().into_iter().flatten().flatten();
    let names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    let ending = |endings: &[&str]| names.iter().find(|name| endings.iter().any(|end| name.ends_with(end)));
    let (reason, remedy) =
        if let Some(name) = ending(&[".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".msgpack", ".h5"]) {
            let remedy = format!(
                "convert it to safetensors: python -c \"from transformers import AutoModelForCausalLM as A; \
             A.from_pretrained('{0}').save_pretrained('{0}')\"",
                folder.display()
            );
            (format!("its weights are in {name}, a format that can run code when it is read"), remedy)
        } else if let Some(name) = ending(&[".gguf"]) {
            (format!("it has no {WEIGHTS} but {name}"), format!("name {} itself", folder.join(name).display()))
        } else {
            (format!("it has neither {WEIGHTS} nor {INDEX}"), "get the folder's weights".to_string())
        };
    Error::model_file(folder, reason, remedy)
}
