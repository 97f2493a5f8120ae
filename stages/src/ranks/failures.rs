//! How the ranks of a run have failed, and which of them is to blame.

use std::any::Any;
use std::fmt;

use crate::error::{ExitCode, StageError};

/// How one rank failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankFailure {
    /// The rank.
    pub rank: usize,
    /// What it said.
    pub message: String,
    /// Its exit code.
    pub code: ExitCode,
    /// It only left because another rank had failed.
    pub is_echo: bool,
}

/// How the ranks of a world failed, in the order in which they did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankFailures {
    /// Number of ranks.
    world: usize,
    failures: Vec<RankFailure>,
}

impl RankFailure {
    /// The failure of `rank` with `error`.
    pub(super) fn of_error(rank: usize, error: &StageError) -> Self {
        Self { rank, message: error.to_string(), code: error.exit_code(), is_echo: error.is_echo() }
    }

    /// The failure of `rank` by a panic.
    pub(super) fn of_panic(rank: usize, payload: &(dyn Any + Send)) -> Self {
        let words = payload.downcast_ref::<String>().map(String::as_str).or(payload.downcast_ref::<&str>().copied());
        let error = StageError::bug(words.unwrap_or("a panic without words"));
        Self { rank, message: error.to_string(), code: ExitCode::Bug, is_echo: false }
    }
}

impl RankFailures {
    /// The failures of a world of `world` ranks, in the order in which they came to be.
    pub(super) fn new(world: usize, failures: Vec<RankFailure>) -> Self {
        Self { world, failures }
    }

    /// The failures that are not mere echoes of others; all if they all are.
    pub fn roots(&self) -> impl Iterator<Item = &RankFailure> {
        let only_echoes = self.failures.iter().all(|failure| failure.is_echo);
        self.failures.iter().filter(move |failure| only_echoes || !failure.is_echo)
    }

    /// The exit code of the rank that failed first by itself.
    pub fn exit_code(&self) -> ExitCode {
        self.roots().next().map_or(ExitCode::Bug, |failure| failure.code)
    }
}

/// Every distinct message once, with the ranks that said it.
impl fmt::Display for RankFailures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut said: Vec<(&str, Vec<usize>)> = Vec::new();
        for RankFailure { rank, message, .. } in self.roots() {
            match said.iter_mut().find(|(known, _)| known == message) {
                Some((_, ranks)) => ranks.push(*rank),
                None => said.push((message, vec![*rank])),
            }
        }
        for (index, (message, mut ranks)) in said.into_iter().enumerate() {
            if index > 0 {
                f.write_str("\nerror: ")?;
            }
            ranks.sort_unstable();
            match ranks[..] {
                _ if ranks.len() == self.world => f.write_str(message)?,
                [rank] if message.starts_with(&format!("rank {rank}:")) => f.write_str(message)?,
                [rank] => write!(f, "rank {rank}: {message}")?,
                _ => write!(f, "ranks {ranks:?}: {message}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(rank: usize, message: &str, code: ExitCode, is_echo: bool) -> RankFailure {
        RankFailure { rank, message: message.into(), code, is_echo }
    }

    #[test]
    fn who_failed_first_by_itself_decides() {
        let failures = RankFailures::new(
            4,
            vec![
                failure(0, "rank 0: rank 2 failed", ExitCode::Communication, true),
                failure(2, "no such file", ExitCode::Data, false),
                failure(1, "internal error", ExitCode::Bug, false),
                failure(3, "internal error", ExitCode::Bug, false),
            ],
        );
        assert_eq!(failures.exit_code(), ExitCode::Data);
        assert_eq!(failures.to_string(), "rank 2: no such file\nerror: ranks [1, 3]: internal error");
    }

    #[test]
    fn what_all_say_is_said_once_and_without_ranks() {
        let all = (0..3).map(|rank| failure(rank, "bad value", ExitCode::Config, false)).collect();
        assert_eq!(RankFailures::new(3, all).to_string(), "bad value");
    }

    #[test]
    fn echoes_count_where_nothing_else_is_known() {
        let failures = RankFailures::new(2, vec![failure(1, "rank 1: rank 0 failed", ExitCode::Communication, true)]);
        assert_eq!(failures.exit_code(), ExitCode::Communication);
        assert_eq!(failures.to_string(), "rank 1: rank 0 failed");
    }
}
