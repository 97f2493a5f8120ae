//! Fetching a model's files from the hub into the shared cache.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use hf_hub::api::sync::{ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};

use super::{RepoId, is_pickle, is_plain, pickle_advice};

const RETRIES: usize = 2;

/// Downloads what is needed of a model and returns its folder.
pub(super) fn fetch(id: &RepoId, cache: &Path) -> Result<PathBuf, String> {
    // The client has assertions about what the server and the cache folder hold.
    catch_unwind(AssertUnwindSafe(|| download(id, cache)))
        .unwrap_or_else(|_| Err(format!("the download client failed; look at {}", cache.display())))
}

fn download(id: &RepoId, cache_folder: &Path) -> Result<PathBuf, String> {
    let explain = |error: ApiError| advice(id, &error);
    let cache = Cache::new(cache_folder.to_owned());
    let mut builder = ApiBuilder::from_cache(cache.clone()).with_retries(RETRIES).with_progress(true);
    if let Ok(endpoint) = std::env::var("HF_ENDPOINT") {
        builder = builder.with_endpoint(endpoint);
    }
    if let Ok(token) = std::env::var("HF_TOKEN") {
        builder = builder.with_token(Some(token));
    }
    let api = builder.build().map_err(explain)?;
    let repo = |revision: &str| Repo::with_revision(id.id().to_owned(), RepoType::Model, revision.to_owned());
    let info = api.repo(repo(id.revision())).info().map_err(explain)?;
    let names: Vec<String> = info.siblings.into_iter().map(|file| file.rfilename).collect();
    let wanted = needed(&names)?;
    // Every file from one commit, even if the branch moves meanwhile.
    let commit = api.repo(repo(&info.sha));
    for name in &wanted {
        commit.get(name).map_err(|error| format!("{name}: {}", advice(id, &error)))?;
    }
    cache.repo(repo(id.revision())).create_ref(&info.sha).map_err(|error| format!("the cache: {error}"))?;
    Ok(cache.repo(repo(id.revision())).pointer_path(&info.sha))
}

/// The files of a repository that a model is made of.
fn needed(names: &[String]) -> Result<Vec<&String>, String> {
    let top: Vec<&String> = names.iter().filter(|name| is_plain(name)).collect();
    let weights: Vec<&String> = top.iter().copied().filter(|name| name.ends_with(".safetensors")).collect();
    if weights.is_empty() {
        return Err(match top.iter().find(|name| is_pickle(name)) {
            Some(pickled) => pickle_advice(pickled),
            None => "the repository has no .safetensors file".into(),
        });
    }
    // Some repositories hold the same weights once more under other names (consolidated.safetensors).
    let standard: Vec<&String> = weights.iter().copied().filter(|name| name.starts_with("model")).collect();
    let weights = if standard.is_empty() { weights } else { standard };
    let is_side = |name: &str| {
        name.ends_with(".json") || ["chat_template.jinja", "merges.txt", "tokenizer.model", "vocab.txt"].contains(&name)
    };
    Ok(top.into_iter().filter(|name| is_side(name)).chain(weights).collect())
}

fn advice(id: &RepoId, error: &ApiError) -> String {
    let text = error.to_string();
    if text.contains("401") || text.contains("403") {
        return format!(
            "the hub refuses access to {id}: accept its licence there and set HF_TOKEN, or check the spelling"
        );
    }
    if text.contains("404") {
        return format!("the hub has no {id}; check the spelling");
    }
    format!(
        "cannot be fetched from the hub ({text}). Without a network: fetch it elsewhere (huggingface-cli download {} \
         --local-dir FOLDER), copy the folder here and name its path; behind a firewall, HF_ENDPOINT can name a mirror",
        id.id()
    )
}
