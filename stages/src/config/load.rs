//! From a file and `--set` arguments to a [`Config`].

use std::fs;
use std::io::Read;
use std::path::Path;

use serde::Deserialize;
use toml::{Table, Value};

use super::Config;
use super::deserialize::{Fault, Node, Problem, quoted};
use super::error::{ConfigError, Origin, nearest};
use super::overrides::Override;

/// Larger files are not configurations, in bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;

impl Config {
    /// Reads the TOML file `path` and applies each `section.key=value` of `overrides`, in order.
    ///
    /// # Errors
    /// [`ConfigError`] naming the file (or the argument), the full path of the key, and the nearest key or value that
    /// exists.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self, ConfigError> {
        let text = read(path)?;
        Self::parse(&text, &Origin::File(path.to_path_buf()), overrides)
    }

    /// As [`Self::load`], from text.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn parse(text: &str, origin: &Origin, overrides: &[String]) -> Result<Self, ConfigError> {
        let mut table: Table = toml::from_str(text).map_err(|error| ConfigError::Syntax {
            path: match origin {
                Origin::File(path) => path.clone(),
                other => other.to_string().into(),
            },
            problem: error.to_string().trim_end().to_owned(),
        })?;
        let overrides: Vec<Override> =
            overrides.iter().map(|argument| Override::parse(argument)).collect::<Result<_, _>>()?;
        for one in &overrides {
            one.apply(&mut table)?;
        }
        let value = Value::Table(table);
        Config::deserialize(Node(&value)).map_err(|fault| explain(fault, origin, &overrides))
    }
}

fn read(path: &Path) -> Result<String, ConfigError> {
    let unreadable = |problem: String, nearest| ConfigError::Unreadable { path: path.into(), problem, nearest };
    let kind = fs::metadata(path).map_err(|error| unreadable(error.to_string(), similar_file(path)))?;
    if !kind.is_file() {
        return Err(unreadable("it is not a file".into(), None));
    }
    let mut text = String::new();
    let file = fs::File::open(path).map_err(|error| unreadable(error.to_string(), None))?;
    file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(|error| unreadable(error.to_string(), None))?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(unreadable(format!("it is larger than {MAX_FILE_BYTES} bytes"), None));
    }
    Ok(text)
}

/// A TOML file in the same folder with a similar name.
fn similar_file(path: &Path) -> Option<String> {
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let names: Vec<String> = fs::read_dir(folder)
        .ok()?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.ends_with(".toml"))
        .collect();
    let name = path.file_name()?.to_str()?;
    nearest(name, names.iter().map(String::as_str)).map(|name| folder.join(name).display().to_string())
}

fn explain(fault: Fault, origin: &Origin, overrides: &[Override]) -> ConfigError {
    let place = fault.path();
    let inside = |key: &str| if place.is_empty() { key.to_owned() } else { format!("{place}.{key}") };
    let origin_of = |key: &str| match overrides.iter().rev().find(|one| one.touches(key)) {
        Some(one) => Origin::Override(one.argument.clone()),
        None => origin.clone(),
    };
    match fault.problem {
        Problem::UnknownKey { key, known } => {
            let full = inside(&key);
            ConfigError::UnknownKey {
                origin: origin_of(&full),
                nearest: nearest(&key, known.iter().copied()).map(inside),
                known: known.iter().map(|&key| key.to_owned()).collect(),
                key: full,
            }
        }
        Problem::UnknownValue { value, known } => ConfigError::Value {
            origin: origin_of(&place),
            nearest: nearest(&value, known.iter().copied()).map(str::to_owned),
            problem: format!("\"{value}\" is none of {}", quoted(known)),
            key: place,
        },
        Problem::Other(problem) => ConfigError::Value { origin: origin_of(&place), key: place, problem, nearest: None },
    }
}
