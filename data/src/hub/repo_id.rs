//! The names of models on the hub, under the rules of `huggingface_hub.utils.validate_repo_id`.

use std::fmt;

/// `owner/name` or `name`, with an optional `@revision` (a branch, tag or commit; `main` if left out).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepoId {
    id: String,
    revision: String,
}

const LONGEST: usize = 96;

impl RepoId {
    /// Checks a name.
    ///
    /// # Errors
    /// The rule that it breaks.
    pub fn parse(name: &str) -> Result<Self, String> {
        let (id, revision) = name.split_once('@').unwrap_or((name, "main"));
        if id.is_empty() || id.len() > LONGEST {
            return Err(format!("a hub id has 1 to {LONGEST} characters"));
        }
        if id.matches('/').count() > 1 {
            return Err("a hub id has the form owner/name".into());
        }
        if let Some(bad) = id.split('/').find_map(bad_part) {
            return Err(bad);
        }
        if id.contains("--") || id.contains("..") {
            return Err("a hub id has no \"--\" or \"..\"".into());
        }
        if id.ends_with(".git") {
            return Err("a hub id does not end with .git".into());
        }
        if revision.len() > LONGEST || bad_part(revision).is_some() || revision.contains("..") {
            return Err(format!("{revision:?} is no branch, tag or commit"));
        }
        Ok(Self { id: id.to_owned(), revision: revision.to_owned() })
    }

    /// `owner/name`.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The branch, tag or commit.
    pub fn revision(&self) -> &str {
        &self.revision
    }

    /// The model's folder in the cache that Hugging Face tools share.
    pub fn cache_name(&self) -> String {
        format!("models--{}", self.id.replace('/', "--"))
    }
}

impl fmt::Display for RepoId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.id, self.revision)
    }
}

fn bad_part(part: &str) -> Option<String> {
    let allowed = |character: char| character.is_ascii_alphanumeric() || matches!(character, '-' | '_' | '.');
    if part.is_empty() || !part.chars().all(allowed) {
        return Some("only letters, digits, '-', '_' and '.' are allowed in a hub id".into());
    }
    if part.starts_with(['-', '.']) || part.ends_with(['-', '.']) {
        return Some("the parts of a hub id do not begin or end with '-' or '.'".into());
    }
    None
}
