//! PPO: what is to be answered.

use tandem_data::length::{self, LengthReport};
use tandem_data::{DataError, Example, Located, Origin, Prompt, Tokenizer};

use super::encode::{encode_all, tell};
use super::rows::stage_rows;
use crate::config::{Config, Stage};
use crate::error::Result;

/// A text must have this many more words than its opening, so that there is something to be written.
const WORDS_LEFT: usize = 2;

/// A prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PromptRow {
    /// The ids that generation starts from.
    pub ids: Vec<u32>,
    /// The prompt as text; of a conversation, its turns, one per line.
    pub text: String,
}

/// What PPO answers.
#[derive(Debug, Clone)]
pub struct Prompts {
    /// To train on; never empty.
    pub train: Vec<PromptRow>,
    /// Held out, at most `eval.prompts`.
    pub eval: Vec<PromptRow>,
    /// Digest of the rows (lower-case hex).
    pub digest: String,
}

/// The prompts of the PPO stage, none longer than `ppo.max_prompt_tokens`: with `ppo.opening_words` the beginnings of the
/// rows' texts, else the rows' prompts.
///
/// # Errors
/// Rows without a prompt, texts that cannot be tokenised, and prompts of which more than half is too long.
pub fn prompts(config: &Config, tokenizer: &Tokenizer) -> Result<Prompts> {
    let rows = stage_rows(config, Stage::Ppo)?;
    let mut report = LengthReport::default();
    let train = encode(rows.train, config, tokenizer, &mut report)?;
    if train.is_empty() && report.too_long == 0 {
        let reason = "is so large that no text is long enough to be continued; lower it".into();
        return Err(DataError::Setting { what: "ppo.opening_words".into(), reason }.into());
    }
    report.check("ppo.max_prompt_tokens")?;
    tell("ppo", &report);
    let mut eval = encode(rows.eval, config, tokenizer, &mut LengthReport::default())?;
    eval.truncate(config.eval.prompts);
    Ok(Prompts { train, eval, digest: rows.digest })
}

fn encode(
    rows: Vec<Located>,
    config: &Config,
    tokenizer: &Tokenizer,
    report: &mut LengthReport,
) -> Result<Vec<PromptRow>> {
    let encoded = encode_all(rows, |Located { origin, example }| {
        let Some(prompt) = prompt_of(&origin, example, config.ppo.opening_words)? else { return Ok(None) };
        let ids = tokenizer.encode_prompt(&prompt)?;
        let text = match prompt {
            Prompt::Text(text) => text,
            Prompt::Messages(turns) => turns.iter().map(|turn| turn.content.as_str()).collect::<Vec<_>>().join("\n"),
        };
        Ok(Some(PromptRow { ids, text }))
    })?;
    let fit = |PromptRow { ids, text }| {
        let ids = length::fit_prompt(ids, config.ppo.max_prompt_tokens, config.data.over_long, report)?;
        Some(PromptRow { ids, text })
    };
    Ok(encoded.into_iter().filter_map(|(_, row)| row).filter_map(fit).collect())
}

/// The prompt of a row; `None` if its text is too short to have an opening.
fn prompt_of(origin: &Origin, example: Example, opening_words: Option<usize>) -> tandem_data::Result<Option<Prompt>> {
    match (opening_words, example) {
        (None, example) => example.into_prompt(origin).map(Some),
        (Some(words), Example::Text { text, .. }) => {
            Ok(opening(&text, words).map(|text| Prompt::Text(text.to_owned())))
        }
        (Some(_), other) => {
            let reason = format!("a {} row; ppo.opening_words needs rows with a text", other.kind());
            Err(DataError::Field { origin: origin.to_string(), reason })
        }
    }
}

/// The first `words` words, as they are spaced; `None` if the text has hardly more.
fn opening(text: &str, words: usize) -> Option<&str> {
    let (mut seen, mut inside, mut end) = (0, false, None);
    for (at, character) in text.char_indices() {
        let word = !character.is_whitespace();
        if inside && !word {
            seen += 1;
            if seen == words {
                end = Some(at);
            }
        }
        inside = word;
    }
    seen += usize::from(inside);
    end.filter(|_| seen >= words + WORDS_LEFT).map(|end| &text[..end])
}

#[cfg(test)]
mod tests {
    use super::super::samples::train_tokenizer;
    use super::*;
    use crate::config::TrainTokenizerConfig;
    use crate::testing::rated;

    #[test]
    fn an_opening_leaves_something_to_write() {
        assert_eq!(opening("a  bc d e", 2), Some("a  bc"));
        assert_eq!(opening("a  bc d", 2), None, "one word is left");
        assert_eq!(opening("a b c ", 1), Some("a"));
        assert_eq!(opening("ä b c d", 2), Some("ä b"));
        assert_eq!(opening("", 1), None);
    }

    #[test]
    fn openings_are_beginnings_of_what_sft_learns() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = rated(dir.path(), 200, "[ppo]\nopening_words = 3\nmax_prompt_tokens = 40");
        let tokenizer =
            train_tokenizer(&config, &TrainTokenizerConfig { vocab_size: 300, ..Default::default() }).unwrap();
        let found = prompts(&config, &tokenizer).unwrap();
        assert!(!found.train.is_empty() && !found.eval.is_empty());
        for row in &found.train {
            assert_eq!(row.text.split_whitespace().count(), 3);
            let whole = format!("{} has good words", row.text);
            assert_eq!(tokenizer.encode_pair(None, &whole).unwrap().ids[..row.ids.len()], row.ids);
        }
        config.ppo.opening_words = Some(5);
        assert!(prompts(&config, &tokenizer).unwrap_err().to_string().contains("opening_words"));
        config.ppo.opening_words = None;
        assert!(prompts(&config, &tokenizer).unwrap_err().to_string().contains("rated.jsonl:"));
    }
}
