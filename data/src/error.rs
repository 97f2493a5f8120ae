//! What can be wrong with data. Every message says what is wrong, where (file, line or row, field), and what to do.

use std::path::{Path, PathBuf};

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The file is not there.
    #[error("{path} does not exist; {present}", path = path.display())]
    NotFound {
        /// The path asked for.
        path: PathBuf,
        /// What is there instead.
        present: String,
    },
    /// The path is a folder, pipe or device where a regular file is needed.
    #[error("{path} is {what}, not a regular file; name a data file", path = path.display())]
    NotAFile {
        /// The path asked for.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// The operating system refused.
    #[error("cannot read {path}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Its answer.
        source: std::io::Error,
    },
    /// The file name's extension is none that is known.
    #[error("{path}: unknown data format; use .jsonl, .ndjson, .json, .parquet, .arrow or .feather", path = path.display())]
    UnknownFormat {
        /// The file.
        path: PathBuf,
    },
    /// Nothing usable is in there.
    #[error("{path} holds no usable rows: {reason}", path = path.display())]
    Empty {
        /// The file.
        path: PathBuf,
        /// Why, with counts.
        reason: String,
    },
    /// A bound of [`crate::limits`] is passed.
    #[error("{path}: {what} is {size}, more than the limit of {limit}; split the file or convert it to JSONL", path = path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// What is too large, with its unit.
        what: String,
        /// Its size.
        size: u64,
        /// The bound.
        limit: u64,
    },
    /// One row cannot be used.
    #[error("{origin}: {reason}; repair the row, or set on_bad_row = \"skip\" to leave such rows out")]
    BadRow {
        /// `file:line` or `file row N`.
        origin: String,
        /// What is wrong with it.
        reason: String,
    },
    /// More rows are bad than `max_bad_fraction` allows.
    #[error("{path}: {bad} of {total} rows are bad, more than max_bad_fraction = {max_fraction}; the first: {first}", path = path.display())]
    TooManyBadRows {
        /// The file.
        path: PathBuf,
        /// Bad rows.
        bad: usize,
        /// All rows.
        total: usize,
        /// The share allowed.
        max_fraction: f64,
        /// The first bad row's message.
        first: String,
    },
    /// A columnar file cannot be decoded.
    #[error("{path}, {place}: {reason}; the file is damaged or not of this format: fetch or write it again", path = path.display())]
    Decode {
        /// The file.
        path: PathBuf,
        /// Row group, batch or footer.
        place: String,
        /// The reader's message.
        reason: String,
    },
    /// A field of a row is missing or of the wrong type.
    #[error("{origin}: {reason}")]
    Field {
        /// `file:line` or `file row N`.
        origin: String,
        /// The field, what is wrong with it, what is there.
        reason: String,
    },
    /// A chat template cannot be compiled or rendered.
    #[error("chat template of {origin}: {reason}")]
    Template {
        /// The file that holds the template.
        origin: String,
        /// What is wrong.
        reason: String,
    },
    /// A tokenizer cannot be loaded, trained or used.
    #[error("tokenizer {origin}: {reason}")]
    Tokenizer {
        /// The file or folder.
        origin: String,
        /// What is wrong and what to do.
        reason: String,
    },
    /// A text cannot be tokenised.
    #[error("cannot tokenise {text:?}: {reason}")]
    Text {
        /// The beginning of the text.
        text: String,
        /// Why.
        reason: String,
    },
    /// A model named on the command line or in a config cannot be found.
    #[error("model {name:?}: {reason}")]
    Model {
        /// The name as given.
        name: String,
        /// What is wrong and what to do.
        reason: String,
    },
    /// A setting has no meaning.
    #[error("{what}: {reason}")]
    Setting {
        /// The setting.
        what: String,
        /// Why it has none and what to write.
        reason: String,
    },
    /// An experience file does not hold what its schema promises.
    #[error("experience {origin}: {reason}")]
    Experience {
        /// File, and row where one is meant.
        origin: String,
        /// What is wrong.
        reason: String,
    },
}

/// The result of this crate.
pub type Result<T, E = DataError> = std::result::Result<T, E>;

impl DataError {
    /// The error of an operating-system call on `path`; a missing file tells what its folder holds.
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        if source.kind() == std::io::ErrorKind::NotFound {
            return DataError::NotFound { path: path.to_owned(), present: whats_there(path) };
        }
        DataError::Io { path: path.to_owned(), source }
    }
}

/// The names in the nearest folder of `path` that exists, nearest spelling first.
fn whats_there(path: &Path) -> String {
    let folder = match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => Path::new("."),
    };
    let Ok(entries) = std::fs::read_dir(folder) else {
        return format!("nor does its folder {}", folder.display());
    };
    let wanted = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let mut names: Vec<String> =
        entries.take(1_000).flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    if names.is_empty() {
        return format!("its folder {} is empty", folder.display());
    }
    let nearness = |name: &String| -(strsim::jaro_winkler(name, &wanted) * 1e6) as i64;
    names.sort_by(|a, b| nearness(a).cmp(&nearness(b)).then(a.cmp(b)));
    let more = names.len().saturating_sub(8);
    names.truncate(8);
    let tail = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{} has: {}{tail}", folder.display(), names.join(", "))
}
