//! `[ppo.reward]` and the rules it shares with `[eval]`: what a response is worth.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::check::Checker;

/// `[ppo.reward]`: at most one of `model`, `rules` and `command`. With none of them it is the reward model of the same
/// pipeline.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RewardSourceConfig {
    /// The folder of a reward model. Its scores are centred and scaled by the mean and spread stored with it.
    pub model: Option<String>,
    /// `[[ppo.reward.rules]]`: built-in rules; the score is their weighted sum.
    pub rules: Option<Vec<RuleConfig>>,
    /// A program and its arguments. It reads JSON lines `{"id", "prompt", "response"}` and writes `{"id", "score"}`.
    pub command: Option<Vec<String>>,
    /// How long the program may take for one iteration, in seconds.
    pub command_timeout_s: f64,
    /// Scores are clipped to ± this; left out: they are not.
    pub clip: Option<f64>,
}

impl Default for RewardSourceConfig {
    fn default() -> Self {
        Self { model: None, rules: None, command: None, command_timeout_s: 600.0, clip: Some(5.0) }
    }
}

/// One rule that scores a response by its text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuleConfig {
    /// What is counted.
    pub kind: RuleKind,
    /// What it is multiplied with.
    #[serde(default = "one")]
    pub weight: f64,
    /// `lexicon`: a file with a word and its score on each line, separated by a tab.
    #[serde(default)]
    pub path: Option<PathBuf>,
    /// `regex`: the expression.
    #[serde(default)]
    pub pattern: Option<String>,
    /// `length`: the length in tokens that is best.
    #[serde(default)]
    pub target_tokens: Option<usize>,
}

/// What a rule counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RuleKind {
    /// The sum of the scores of the response's words.
    Lexicon,
    /// The number of matches.
    Regex,
    /// Minus the relative distance from `target_tokens`.
    Length,
}

fn one() -> f64 {
    1.0
}

impl RuleConfig {
    /// Checks the rule at `key`, for example `ppo.reward.rules[0]`.
    pub(super) fn check(&self, key: &str, check: &mut Checker) {
        check.finite(&format!("{key}.weight"), self.weight);
        let (kind, needed, given) = match self.kind {
            RuleKind::Lexicon => ("lexicon", "path", self.path.is_some()),
            RuleKind::Regex => ("regex", "pattern", self.pattern.is_some()),
            RuleKind::Length => ("length", "target_tokens", self.target_tokens.is_some_and(|tokens| tokens > 0)),
        };
        if !given {
            check.fail(key, format_args!("is of kind \"{kind}\", which needs `{needed}`"));
        }
        if let Some(pattern) = &self.pattern
            && let Err(error) = regex::Regex::new(pattern)
        {
            check.fail(&format!("{key}.pattern"), format_args!("is not a regular expression: {error}"));
        }
    }
}

impl RewardSourceConfig {
    /// Whether a reward model scores.
    pub fn is_model(&self) -> bool {
        self.rules.is_none() && self.command.is_none()
    }

    pub(super) fn check(&self, check: &mut Checker) {
        let given = [self.model.is_some(), self.rules.is_some(), self.command.is_some()];
        if given.iter().filter(|&&given| given).count() > 1 {
            check.fail("ppo.reward", "has more than one of `model`, `rules` and `command`; keep one");
        }
        if let Some(rules) = &self.rules {
            if rules.is_empty() {
                check.fail("ppo.reward.rules", "is empty; give at least one rule");
            }
            for (index, rule) in rules.iter().enumerate() {
                rule.check(&format!("ppo.reward.rules[{index}]"), check);
            }
        }
        if self.command.as_ref().is_some_and(|command| command.first().is_none_or(String::is_empty)) {
            check.fail("ppo.reward.command", "is empty; give a program and its arguments");
        }
        check.positive("ppo.reward.command_timeout_s", self.command_timeout_s);
        if let Some(clip) = self.clip {
            check.positive("ppo.reward.clip", clip);
        }
    }
}
