//! From a model's name to the folder or file that holds it: a path, or a Hugging Face hub id (`owner/name`, with an optional
//! `@revision`).
//!
//! Hub models come from the local cache that Hugging Face tools share; only what is missing there is downloaded (feature
//! `hub`). Pickled weights (`.bin`, `.pt`) are programs and never touched.

#[cfg(feature = "hub")]
mod download;
mod repo_id;

use std::path::{Path, PathBuf};

pub use repo_id::RepoId;

use crate::error::{DataError, Result};

/// The folder (or `.gguf` file) of a model.
///
/// A path that exists is taken as it is. Anything else must be a hub id: the cache (`HF_HUB_CACHE`, `HF_HOME/hub` or
/// `~/.cache/huggingface/hub`) is looked up first, then the hub (`HF_ENDPOINT` names a mirror, `HF_TOKEN` opens private
/// models, `HF_HUB_OFFLINE=1` forbids it).
///
/// # Errors
/// Nothing of that name, a folder without safetensors, an id that is none, a download that fails; each says what to do.
pub fn resolve_model(name: &str) -> Result<PathBuf> {
    resolve_model_in(name, &cache_folder(name)?)
}

/// As [`resolve_model`], with the cache at `cache`.
///
/// # Errors
/// As [`resolve_model`].
pub fn resolve_model_in(name: &str, cache: &Path) -> Result<PathBuf> {
    let path = Path::new(name);
    if path.exists() {
        return local(name, path);
    }
    let looks_like_a_path =
        name.starts_with(['/', '.', '~']) || name.ends_with(".gguf") || name.matches('/').count() > 1;
    if looks_like_a_path {
        let there = DataError::io(path, std::io::ErrorKind::NotFound.into());
        return Err(wrong(name, there.to_string()));
    }
    let id =
        RepoId::parse(name).map_err(|reason| wrong(name, format!("no such folder here, nor a hub id: {reason}")))?;
    if let Some(folder) = cached(&id, cache) {
        return Ok(folder);
    }
    fetch(name, &id, cache)
}

fn local(name: &str, path: &Path) -> Result<PathBuf> {
    if path.is_file() {
        let gguf = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
        return if gguf {
            Ok(path.to_owned())
        } else {
            Err(wrong(name, "is a file, but not a .gguf; name the model's folder".into()))
        };
    }
    let names = file_names(path).map_err(|source| DataError::io(path, source))?;
    if names.iter().any(|name| name.ends_with(".safetensors")) {
        return Ok(path.to_owned());
    }
    if let Some(pickled) = names.iter().find(|name| is_pickle(name)) {
        return Err(wrong(name, pickle_advice(pickled)));
    }
    let gguf: Vec<&String> = names.iter().filter(|name| name.ends_with(".gguf")).collect();
    match gguf.as_slice() {
        [only] => Ok(path.join(only)),
        [] => Err(wrong(name, format!("the folder has no .safetensors file (it has: {})", shown(&names)))),
        several => Err(wrong(name, format!("the folder has {} .gguf files; name one of them", several.len()))),
    }
}

/// The snapshot of a model in the cache, if it is complete: `models--owner--name/{refs/<revision>, snapshots/<commit>/…}`.
fn cached(id: &RepoId, cache: &Path) -> Option<PathBuf> {
    let repository = cache.join(id.cache_name());
    let reference = std::fs::read_to_string(repository.join("refs").join(id.revision())).ok();
    let commit = reference.as_deref().map(str::trim).unwrap_or(id.revision());
    // The reference is a file's content; only a commit may become a path.
    if commit.len() != 40 || !commit.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let folder = repository.join("snapshots").join(commit);
    is_complete(&folder).then_some(folder)
}

fn is_complete(folder: &Path) -> bool {
    let there = |name: &str| folder.join(name).is_file();
    if !there("config.json") || !there("tokenizer.json") {
        return false;
    }
    let Ok(index) = std::fs::read(folder.join("model.safetensors.index.json")) else {
        return file_names(folder).is_ok_and(|names| names.iter().any(|name| name.ends_with(".safetensors")));
    };
    let index: serde_json::Value = serde_json::from_slice(&index).unwrap_or_default();
    let shards = index["weight_map"].as_object();
    shards.is_some_and(|map| {
        map.values().all(|shard| shard.as_str().is_some_and(|shard| is_plain(shard) && there(shard)))
    })
}

#[cfg(feature = "hub")]
fn fetch(name: &str, id: &RepoId, cache: &Path) -> Result<PathBuf> {
    if std::env::var_os("HF_HUB_OFFLINE").is_some_and(|value| !value.is_empty() && value != "0") {
        return Err(wrong(name, format!("not in the cache {}, and HF_HUB_OFFLINE is set", cache.display())));
    }
    download::fetch(id, cache).map_err(|reason| wrong(name, reason))
}

#[cfg(not(feature = "hub"))]
fn fetch(name: &str, id: &RepoId, cache: &Path) -> Result<PathBuf> {
    let reason = format!("{id} is not in the cache {}, and this program was built without downloads", cache.display());
    Err(wrong(name, reason))
}

fn cache_folder(name: &str) -> Result<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    variable("HF_HUB_CACHE")
        .or_else(|| variable("HF_HOME").map(|home| home.join("hub")))
        .or_else(|| variable("HOME").map(|home| home.join(".cache/huggingface/hub")))
        .ok_or_else(|| wrong(name, "none of HF_HUB_CACHE, HF_HOME and HOME is set, so there is no model cache".into()))
}

fn file_names(folder: &Path) -> std::io::Result<Vec<String>> {
    let mut names: Vec<String> =
        std::fs::read_dir(folder)?.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    Ok(names)
}

fn shown(names: &[String]) -> String {
    if names.is_empty() { "nothing".into() } else { names[..names.len().min(12)].join(", ") }
}

/// One path component that does not climb and is not hidden.
fn is_plain(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\', ':', '\0'])
}

fn is_pickle(name: &str) -> bool {
    [".bin", ".pt", ".pth", ".ckpt"].iter().any(|extension| name.ends_with(extension))
}

fn pickle_advice(file: &str) -> String {
    format!(
        "has only pickled weights ({file}), which can run code when opened; convert them to safetensors, on a machine where \
         you trust them: python -c \"from transformers import AutoModelForCausalLM as M; \
         M.from_pretrained('IN').save_pretrained('OUT')\""
    )
}

fn wrong(name: &str, reason: String) -> DataError {
    DataError::Model { name: name.to_owned(), reason }
}
