//! What responses are worth: by a reward model, by rules, or by an external program.
//!
//! A [`Scorer`] sees token ids and text, so that it can be any of the three. What it returns is checked in one place: one finite
//! number for each response, in their order. PPO takes a scorer as its reward; the evaluation after it takes another one,
//! which PPO never saw, as a judge.

mod command;
mod model;
mod rules;

use tandem_data::Tokenizer;

pub use command::CommandScorer;
pub use model::ModelScorer;
pub use rules::RuleScorer;

use crate::error::{Result, StageError};
use crate::plan::RewardSource;
use crate::ranks::{LEADER, Team};

/// A response to be scored, with its prompt.
#[derive(Debug, Clone, Copy)]
pub struct ScoreItem<'a> {
    /// The prompt as the policy read it.
    pub prompt_ids: &'a [u32],
    /// The response as the policy wrote it, the end token included if it wrote one.
    pub response_ids: &'a [u32],
    /// The prompt as text.
    pub prompt_text: &'a str,
    /// The response as text, without special tokens.
    pub response_text: &'a str,
}

/// Says what responses are worth.
pub trait Scorer {
    /// One finite number for each item, in their order.
    ///
    /// # Errors
    /// What the scorer could not do, or the item for which it has no finite number.
    fn score(&mut self, items: &[ScoreItem<'_>]) -> Result<Vec<f32>>;
}

/// The scorer that `source` describes, for the ranks of `team`. `policy` is the tokenizer of the ids it will get; a reward model reads at most
/// `tokens_per_micro_batch` tokens in one pass.
///
/// # Errors
/// A reward model that cannot be loaded, a lexicon that cannot be read.
pub fn scorer(
    team: &Team,
    source: &RewardSource,
    policy: &Tokenizer,
    tokens_per_micro_batch: usize,
) -> Result<Box<dyn Scorer>> {
    Ok(match source {
        RewardSource::Model(path) => Box::new(ModelScorer::load(team, path, policy, tokens_per_micro_batch)?),
        RewardSource::Rules(rules) => Box::new(RuleScorer::new(rules)?),
        RewardSource::Command { command, timeout_s } => {
            let program = CommandScorer::new(command, *timeout_s)?;
            Box::new(LedScorer { scorer: program, team: team.clone() })
        }
    })
}

/// A scorer that one rank asks for all: an outside program is started once, however many ranks there are.
struct LedScorer<S> {
    scorer: S,
    team: Team,
}

impl<S: Scorer> Scorer for LedScorer<S> {
    fn score(&mut self, items: &[ScoreItem<'_>]) -> Result<Vec<f32>> {
        let world = &self.team.parallel().world;
        if world.is_solo() {
            return self.scorer.score(items);
        }
        let mut message = vec![0u8; 4 * items.len()];
        if world.rank() == LEADER {
            message = self.scorer.score(items)?.into_iter().flat_map(f32::to_le_bytes).collect();
        }
        world.world().broadcast(world.tag("scores of the leader"), &mut message, LEADER)?;
        Ok(message.as_chunks::<4>().0.iter().map(|four| f32::from_le_bytes(*four)).collect())
    }
}

/// Passes `scores` on if they are finite.
fn finite(scores: Vec<f32>, items: &[ScoreItem<'_>]) -> Result<Vec<f32>> {
    match scores.iter().position(|score| !score.is_finite()) {
        None => Ok(scores),
        Some(index) => Err(StageError::Reward(format!(
            "the score of response {index} is {}, not a finite number; the response is {:?}",
            scores[index],
            beginning(items[index].response_text)
        ))),
    }
}

/// Enough of a text to recognise it.
fn beginning(text: &str) -> String {
    const SHOWN_CHARACTERS: usize = 80;
    match text.char_indices().nth(SHOWN_CHARACTERS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_finite_is_named() {
        let item = ScoreItem { prompt_ids: &[], response_ids: &[], prompt_text: "", response_text: "b" };
        assert_eq!(finite(vec![1.0, -2.0], &[item; 2]).unwrap(), [1.0, -2.0]);
        for bad in [f32::NAN, f32::INFINITY] {
            let message = finite(vec![0.0, bad], &[item; 2]).unwrap_err().to_string();
            assert!(message.contains("response 1") && message.contains("\"b\""), "{message}");
        }
    }

    #[test]
    fn texts_are_cut_between_characters() {
        assert_eq!(beginning("short"), "short");
        assert_eq!(beginning(&"ä".repeat(100)), format!("{}…", "ä".repeat(80)));
    }
}
