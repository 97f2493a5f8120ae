//! What can be wrong with a configuration, said so that it can be put right.

use std::fmt;
use std::path::PathBuf;

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}: {problem}{}", path.display(), hint(nearest.as_deref()))]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why not.
        problem: String,
        /// A file that may have been meant.
        nearest: Option<String>,
    },
    /// The file is not TOML.
    #[error("{} is not valid TOML: {problem}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// What the parser says, with the line.
        problem: String,
    },
    /// A key that does not exist.
    #[error("{origin}: unknown key `{key}`{}; known keys here: {}", hint(nearest.as_deref()), known.join(", "))]
    UnknownKey {
        /// The file, or the command-line argument.
        origin: Origin,
        /// The full path of the key.
        key: String,
        /// The key that may have been meant, with its full path.
        nearest: Option<String>,
        /// The keys that exist at that place.
        known: Vec<String>,
    },
    /// A value of the wrong type, or none of the values that exist.
    #[error("{origin}: `{key}`: {problem}{}", hint(nearest.as_deref()))]
    Value {
        /// The file, or the command-line argument.
        origin: Origin,
        /// The full path of the key.
        key: String,
        /// What is wrong.
        problem: String,
        /// The value that may have been meant.
        nearest: Option<String>,
    },
    /// Values outside their range, or that contradict each other; all of them at once.
    #[error("{origin}: {}", list(problems))]
    Invalid {
        /// The file.
        origin: Origin,
        /// One line for each problem, with the full path of the key.
        problems: Vec<String>,
    },
    /// A `--set` that is not `section.key=value`.
    #[error("--set {argument}: {problem}; write it like --set ppo.iterations=5")]
    Override {
        /// The argument.
        argument: String,
        /// What is wrong.
        problem: String,
    },
    /// The ranks of one world are not about to do the same.
    #[error(
        "rank {rank} has another {what} than rank {leader}; start all ranks with the same program, configuration and \
         arguments"
    )]
    RanksDiffer {
        /// The first rank that differs.
        rank: usize,
        /// The rank it is compared with.
        leader: usize,
        /// What differs.
        what: &'static str,
    },
    /// The output directory holds a run of another plan.
    #[error(
        "{} holds a run of another plan, which this one cannot continue:\n  {}\nuse another --output-dir, restore these \
         values, or pass --resume never to start over (the old run is set aside, not deleted)",
        dir.display(), differences.join("\n  ")
    )]
    OtherPlan {
        /// The output directory.
        dir: PathBuf,
        /// Each differing key with both values.
        differences: Vec<String>,
    },
}

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A file.
    File(PathBuf),
    /// A command-line argument `--set …`.
    Override(String),
    /// Neither: the built-in values.
    Defaults,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::File(path) => write!(f, "{}", path.display()),
            Origin::Override(argument) => write!(f, "--set {argument}"),
            Origin::Defaults => f.write_str("configuration"),
        }
    }
}

/// The candidate most like `word`, if any is similar enough to be what was meant.
pub(super) fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    /// Below this, suggestions confuse more than they help.
    const MIN_SIMILARITY: f64 = 0.75;
    candidates
        .into_iter()
        .map(|candidate| (strsim::jaro_winkler(word, candidate), candidate))
        .filter(|&(similarity, _)| similarity >= MIN_SIMILARITY)
        .max_by(|one, other| one.0.total_cmp(&other.0))
        .map(|(_, candidate)| candidate)
}

fn hint(nearest: Option<&str>) -> String {
    nearest.map_or_else(String::new, |nearest| format!("; did you mean `{nearest}`?"))
}

fn list(problems: &[String]) -> String {
    match problems {
        [one] => one.clone(),
        many => format!("{} problems:\n  {}", many.len(), many.join("\n  ")),
    }
}
