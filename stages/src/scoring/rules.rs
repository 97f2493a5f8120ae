//! Built-in rules: a lexicon, a regular expression, a length. The score is their weighted sum.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::Read;
use std::path::Path;

use regex::Regex;

use super::{ScoreItem, Scorer, finite};
use crate::config::{RuleConfig, RuleKind};
use crate::error::{Result, StageError};

/// A larger file is no lexicon, in bytes.
const MAX_LEXICON_BYTES: u64 = 64 << 20;
/// A word is negated if one of this many words before it is a negation (Hutto and Gilbert, 2014, section 3.3).
const NEGATION_REACH: usize = 3;
/// What a negated word's score is multiplied with; the same paper's measurement.
const NEGATED: f64 = -0.74;
/// Words that negate; of contractions also the spelling without an apostrophe.
const NEGATIONS: &str = "aint arent cannot cant couldnt darent didnt doesnt dont hadnt hardly hasnt havent isnt mightnt mustnt \
                         neednt neither never no none nope nor not nothing nowhere oughtnt rarely seldom shant shouldnt \
                         wasnt werent without wont wouldnt";

/// The weighted sum of some rules.
#[derive(Debug)]
pub struct RuleScorer {
    rules: Vec<(f64, Rule)>,
}

#[derive(Debug)]
enum Rule {
    Lexicon(Lexicon),
    Regex(Regex),
    /// The best length in tokens.
    Length(usize),
}

impl RuleScorer {
    /// Prepares `rules`: reads lexicons, compiles expressions.
    ///
    /// # Errors
    /// [`StageError::Reward`] naming the file and line, or the expression.
    pub fn new(rules: &[RuleConfig]) -> Result<Self> {
        let rules = rules.iter().map(|rule| Ok((rule.weight, Rule::new(rule)?))).collect::<Result<_>>()?;
        Ok(Self { rules })
    }

    fn total(&self, item: &ScoreItem<'_>) -> f32 {
        self.rules.iter().map(|(weight, rule)| weight * rule.score(item)).sum::<f64>() as f32
    }
}

impl Scorer for RuleScorer {
    fn score(&mut self, items: &[ScoreItem<'_>]) -> Result<Vec<f32>> {
        finite(items.iter().map(|item| self.total(item)).collect(), items)
    }
}

impl Rule {
    fn new(rule: &RuleConfig) -> Result<Self> {
        match (rule.kind, &rule.path, &rule.pattern, rule.target_tokens) {
            (RuleKind::Lexicon, Some(path), ..) => Ok(Rule::Lexicon(Lexicon::load(path)?)),
            (RuleKind::Regex, _, Some(pattern), _) => match Regex::new(pattern) {
                Ok(regex) => Ok(Rule::Regex(regex)),
                Err(error) => Err(StageError::Reward(format!("{pattern:?} is not a regular expression: {error}"))),
            },
            (RuleKind::Length, .., Some(target)) if target > 0 => Ok(Rule::Length(target)),
            (kind, ..) => Err(StageError::Reward(format!(
                "a rule of kind {kind:?} lacks what it needs: lexicon a `path`, regex a `pattern`, length a `target_tokens`"
            ))),
        }
    }

    fn score(&self, item: &ScoreItem<'_>) -> f64 {
        match self {
            Rule::Lexicon(lexicon) => lexicon.score(item.response_text),
            Rule::Regex(regex) => regex.find_iter(item.response_text).count() as f64,
            Rule::Length(target) => -(item.response_ids.len().abs_diff(*target) as f64 / *target as f64),
        }
    }
}

/// Words with a score each.
#[derive(Debug)]
struct Lexicon {
    scores: HashMap<String, f64>,
    negations: HashSet<&'static str>,
}

impl Lexicon {
    /// Reads a file with a word, a tab and a number on each line.
    fn load(path: &Path) -> Result<Self> {
        let unreadable = |error: std::io::Error| StageError::Reward(format!("cannot read {}: {error}", path.display()));
        let mut text = String::new();
        let file = File::open(path).map_err(unreadable)?;
        file.take(MAX_LEXICON_BYTES + 1).read_to_string(&mut text).map_err(unreadable)?;
        if text.len() as u64 > MAX_LEXICON_BYTES {
            let limit = MAX_LEXICON_BYTES >> 20;
            return Err(StageError::Reward(format!("{} is larger than {limit} MiB; no lexicon is", path.display())));
        }
        Self::parse(&text, path)
    }

    fn parse(text: &str, path: &Path) -> Result<Self> {
        let mut scores = HashMap::new();
        for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let entry = line.split_once('\t').and_then(|(word, score)| {
                let score: f64 = score.trim().parse().ok()?;
                score.is_finite().then(|| (word.trim().to_lowercase(), score))
            });
            let Some((word, score)) = entry else {
                return Err(StageError::Reward(format!(
                    "{}, line {}: {line:?} is not a word, a tab and a number",
                    path.display(),
                    index + 1
                )));
            };
            // Where upper and lower case of an emoticon differ the first one counts.
            scores.entry(word).or_insert(score);
        }
        if scores.is_empty() {
            return Err(StageError::Reward(format!("{} holds no words", path.display())));
        }
        Ok(Self { scores, negations: NEGATIONS.split_whitespace().collect() })
    }

    /// The sum of the words' scores, those after a negation turned round. Entries that are not single words (emoticons,
    /// phrases) are not looked for.
    fn score(&self, text: &str) -> f64 {
        let words = words(text);
        let mut total = 0.0;
        for (index, word) in words.iter().enumerate() {
            let Some(score) = self.scores.get(word) else { continue };
            let before = &words[index.saturating_sub(NEGATION_REACH)..index];
            let negated = before.iter().any(|word| self.negations.contains(word.replace('\'', "").as_str()));
            total += if negated { score * NEGATED } else { *score };
        }
        total
    }
}

/// Lower-cased runs of letters, digits and inner apostrophes.
fn words(text: &str) -> Vec<String> {
    let text = text.to_lowercase().replace('\u{2019}', "'");
    let pieces = text.split(|character: char| !character.is_alphanumeric() && character != '\'');
    pieces.map(|piece| piece.trim_matches('\'')).filter(|piece| !piece.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(response_text: &str) -> ScoreItem<'_> {
        ScoreItem { prompt_ids: &[], response_ids: &[7; 6], prompt_text: "good", response_text }
    }

    fn rule(kind: RuleKind, weight: f64) -> RuleConfig {
        RuleConfig { kind, weight, path: None, pattern: None, target_tokens: None }
    }

    fn lexicon() -> Lexicon {
        Lexicon::parse("good\t1.9\nBad\t-2.5\n\n:-)\t1.3\n", Path::new("words.tsv")).unwrap()
    }

    #[test]
    fn words_are_lower_cased_and_bare() {
        assert_eq!(words("It’s ''GOOD'', isn't-it?"), ["it's", "good", "isn't", "it"]);
        assert!(words(" … ").is_empty());
    }

    #[test]
    fn a_lexicon_sums_and_negates() {
        let lexicon = lexicon();
        for (text, expected) in [
            ("Good, good and bad.", 1.9 + 1.9 - 2.5),
            ("goodness", 0.0),
            ("not good", -0.74 * 1.9),
            ("It isn't at all good", -0.74 * 1.9),
            ("It isn’t at all good", -0.74 * 1.9),
            ("never one that is good", 1.9),
            ("not bad , just good", -0.74 * -2.5 - 0.74 * 1.9),
        ] {
            assert!((lexicon.score(text) - expected).abs() < 1e-12, "{text}: {}", lexicon.score(text));
        }
    }

    #[test]
    fn a_damaged_lexicon_names_the_line() {
        for damaged in ["good 1.9", "good\tvery", "good\tNaN", "good\t1\nbad"] {
            let message = Lexicon::parse(damaged, Path::new("words.tsv")).unwrap_err().to_string();
            assert!(message.contains("words.tsv, line "), "{message}");
        }
        assert!(Lexicon::parse("\n", Path::new("words.tsv")).unwrap_err().to_string().contains("no words"));
        let missing = RuleConfig { path: Some("missing.tsv".into()), ..rule(RuleKind::Lexicon, 1.0) };
        assert!(RuleScorer::new(&[missing]).unwrap_err().to_string().contains("missing.tsv"));
    }

    #[test]
    fn rules_are_weighted_and_see_the_response_only() {
        let pattern = RuleConfig { pattern: Some("o+".into()), ..rule(RuleKind::Regex, 2.0) };
        let length = RuleConfig { target_tokens: Some(4), ..rule(RuleKind::Length, 3.0) };
        let mut scorer = RuleScorer::new(&[pattern, length]).unwrap();
        // Two matches; 6 tokens are half of the target too many.
        assert_eq!(scorer.score(&[item("look, so"), item("")]).unwrap(), [2.0 * 2.0 - 3.0 * 0.5, -1.5]);
        assert_eq!(scorer.score(&[]).unwrap(), [0.0; 0]);
    }

    #[test]
    fn a_rule_without_what_it_needs_is_refused() {
        for kind in [RuleKind::Lexicon, RuleKind::Regex, RuleKind::Length] {
            assert!(RuleScorer::new(&[rule(kind, 1.0)]).is_err());
        }
        let broken = RuleConfig { pattern: Some("(".into()), ..rule(RuleKind::Regex, 1.0) };
        assert!(RuleScorer::new(&[broken]).unwrap_err().to_string().contains("\"(\""));
    }
}
