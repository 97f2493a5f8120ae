//! From a row to an example: which field means what.
//!
//! Without a mapping the usual names are tried (`prompt`, `chosen`, `rejected`, `messages`, `instruction`, `input`,
//! `response`, `text`, `rating`, `margin`, and for responses also `output` and `completion`). A [`FieldMap`] names a field
//! explicitly; then it must be there.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{DataError, Result};
use crate::example::{Example, Message, Prompt};
use crate::row::Row;

/// Which field of the rows plays which part; `None`: the usual name, if it is there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FieldMap {
    /// The prompt: a text, or a list of messages.
    pub prompt: Option<String>,
    /// The preferred response: a text, or a list of messages that ends with it.
    pub chosen: Option<String>,
    /// The other response.
    pub rejected: Option<String>,
    /// A conversation: a list of `{role, content}`.
    pub messages: Option<String>,
    /// An instruction, another word for a prompt.
    pub instruction: Option<String>,
    /// What the instruction is about; joined to it by an empty line.
    pub input: Option<String>,
    /// The response to a prompt or instruction.
    pub response: Option<String>,
    /// A text without parts.
    pub text: Option<String>,
    /// A human rating of the text, a number.
    pub rating: Option<String>,
    /// By how much the chosen response is better, a number.
    pub margin: Option<String>,
}

const PROMPT: &[&str] = &["prompt"];
const CHOSEN: &[&str] = &["chosen"];
const REJECTED: &[&str] = &["rejected"];
const MESSAGES: &[&str] = &["messages"];
const INSTRUCTION: &[&str] = &["instruction"];
const INPUT: &[&str] = &["input"];
const RESPONSE: &[&str] = &["response", "output", "completion"];
const TEXT: &[&str] = &["text"];
const RATING: &[&str] = &["rating", "score"];
const MARGIN: &[&str] = &["margin"];

impl FieldMap {
    /// Reads a row. What it is follows from the fields that are there, richest first: messages, a pair, a response to a prompt
    /// or instruction, a text, a bare prompt.
    ///
    /// # Errors
    /// Mapped fields that are missing, fields of the wrong type, and rows with none of the known fields; the message names
    /// the row, the field and the fields that are there.
    pub fn example(&self, row: &Row) -> Result<Example> {
        self.check_mapped(row)?;
        if let Some(messages) = Field::find(row, &self.messages, MESSAGES) {
            return Ok(Example::Chat { messages: messages.messages()? });
        }
        let prompt = Field::find(row, &self.prompt, PROMPT).map(|field| field.prompt()).transpose()?;
        if let Some(chosen) = Field::find(row, &self.chosen, CHOSEN) {
            let rejected = Field::find(row, &self.rejected, REJECTED).ok_or_else(|| missing(row, "rejected"))?;
            let margin = Field::find(row, &self.margin, MARGIN).map(|field| field.number()).transpose()?;
            return pair(row, prompt, &chosen, &rejected, margin);
        }
        let prompt = match (prompt, Field::find(row, &self.instruction, INSTRUCTION)) {
            (None, Some(instruction)) => Some(Prompt::Text(match Field::find(row, &self.input, INPUT) {
                Some(input) if !input.text()?.trim().is_empty() => {
                    format!("{}\n\n{}", instruction.text()?, input.text()?)
                }
                _ => instruction.text()?.to_owned(),
            })),
            (prompt, _) => prompt,
        };
        let response = Field::find(row, &self.response, RESPONSE);
        let rating = Field::find(row, &self.rating, RATING);
        match (prompt, response, Field::find(row, &self.text, TEXT)) {
            (Some(prompt), Some(response), _) => Ok(Example::Response { prompt, response: response.content()? }),
            (None, Some(_), None) => Err(missing(row, "prompt")),
            (None, _, Some(text)) => {
                let rating = rating.map(|field| field.number()).transpose()?;
                Ok(Example::Text { text: text.content()?, rating })
            }
            (Some(prompt), None, _) => Ok(Example::Prompt { prompt }),
            (None, None, None) => Err(nothing_known(row)),
        }
    }

    fn check_mapped(&self, row: &Row) -> Result<()> {
        let mapped = [
            ("prompt", &self.prompt),
            ("chosen", &self.chosen),
            ("rejected", &self.rejected),
            ("messages", &self.messages),
            ("instruction", &self.instruction),
            ("response", &self.response),
            ("text", &self.text),
            ("rating", &self.rating),
        ];
        for (part, name) in mapped {
            if let Some(name) = name
                && row.fields.get(name).is_none_or(Value::is_null)
            {
                let reason = format!("the field {name:?} (mapped as {part}) is missing; {}", present(row, name));
                return Err(DataError::Field { origin: row.origin.to_string(), reason });
            }
        }
        Ok(())
    }
}

/// A field of a row that is there and not null.
struct Field<'a> {
    row: &'a Row,
    name: &'a str,
    value: &'a Value,
}

impl<'a> Field<'a> {
    fn find(row: &'a Row, mapped: &'a Option<String>, usual: &[&'a str]) -> Option<Self> {
        let names = mapped.iter().map(String::as_str).chain(usual.iter().copied().filter(|_| mapped.is_none()));
        names
            .filter_map(|name| row.fields.get(name).map(|value| Field { row, name, value }))
            .find(|field| !field.value.is_null())
    }

    fn wrong(&self, needed: &str) -> DataError {
        let kind = match self.value {
            Value::Null => "null",
            Value::Bool(_) => "a boolean",
            Value::Number(_) => "a number",
            Value::String(_) => "a text",
            Value::Array(_) => "a list",
            Value::Object(_) => "an object",
        };
        let reason = format!("the field {:?} is {kind} where {needed} belongs", self.name);
        DataError::Field { origin: self.row.origin.to_string(), reason }
    }

    fn text(&self) -> Result<&'a str> {
        self.value.as_str().ok_or_else(|| self.wrong("a text"))
    }

    /// A text with something in it.
    fn content(&self) -> Result<String> {
        let text = self.text()?;
        if text.trim().is_empty() {
            let reason = format!("the field {:?} is an empty text", self.name);
            return Err(DataError::Field { origin: self.row.origin.to_string(), reason });
        }
        Ok(text.to_owned())
    }

    fn number(&self) -> Result<f32> {
        let number = self.value.as_f64().map(|number| number as f32).filter(|number| number.is_finite());
        number.ok_or_else(|| self.wrong("a finite number"))
    }

    fn prompt(&self) -> Result<Prompt> {
        match self.value {
            Value::Array(_) => Ok(Prompt::Messages(self.messages()?)),
            _ => Ok(Prompt::Text(self.content()?)),
        }
    }

    fn messages(&self) -> Result<Vec<Message>> {
        let items = self.value.as_array().ok_or_else(|| self.wrong("a list of messages {role, content}"))?;
        let mut messages = Vec::with_capacity(items.len());
        for (index, item) in items.iter().enumerate() {
            let part = |name: &str| {
                item.get(name).and_then(Value::as_str).map(str::to_owned).ok_or_else(|| {
                    let reason = format!("message {} of {:?} has no text {name:?}", index + 1, self.name);
                    DataError::Field { origin: self.row.origin.to_string(), reason }
                })
            };
            messages.push(Message { role: part("role")?, content: part("content")? });
        }
        if messages.is_empty() {
            return Err(self.wrong("a list with at least one message"));
        }
        Ok(messages)
    }
}

fn pair(
    row: &Row,
    prompt: Option<Prompt>,
    chosen: &Field<'_>,
    rejected: &Field<'_>,
    margin: Option<f32>,
) -> Result<Example> {
    let wrong = |reason: &str| DataError::Field { origin: row.origin.to_string(), reason: reason.into() };
    if !chosen.value.is_array() {
        let (chosen, rejected) = (chosen.content()?, rejected.content()?);
        return match prompt {
            Some(prompt) => Ok(Example::Pair { prompt, chosen, rejected, margin }),
            None => {
                let at = transcript_prompt(&chosen, &rejected).ok_or_else(|| missing(row, "prompt"))?;
                let prompt = Prompt::Text(chosen[..at].to_owned());
                let (chosen, rejected) = (chosen[at..].to_owned(), rejected[at..].to_owned());
                Ok(Example::Pair { prompt, chosen, rejected, margin })
            }
        };
    }
    let (mut chosen, mut rejected) = (chosen.messages()?, rejected.messages()?);
    let (Some(chosen_last), Some(rejected_last)) = (chosen.pop(), rejected.pop()) else {
        return Err(wrong("chosen and rejected need at least one message"));
    };
    if chosen_last.role != "assistant" || rejected_last.role != "assistant" {
        return Err(wrong("the last message of chosen and of rejected must be the assistant's"));
    }
    let prompt = match prompt {
        Some(prompt) => prompt,
        None if chosen != rejected => return Err(wrong("chosen and rejected answer different conversations")),
        None if chosen.is_empty() => return Err(missing(row, "prompt")),
        None => Prompt::Messages(chosen),
    };
    Ok(Example::Pair { prompt, chosen: chosen_last.content, rejected: rejected_last.content, margin })
}

/// Where the prompt ends in two transcripts of the form of Anthropic's `hh-rlhf`, which has no prompt field: after the last
/// `Assistant:` that both share.
fn transcript_prompt(chosen: &str, rejected: &str) -> Option<usize> {
    const TURN: &str = "\n\nAssistant:";
    let shared = chosen.bytes().zip(rejected.bytes()).take_while(|(a, b)| a == b).count();
    let end = chosen.match_indices(TURN).map(|(at, _)| at + TURN.len()).take_while(|&end| end <= shared).last()?;
    (end < chosen.len() && end < rejected.len()).then_some(end)
}

fn missing(row: &Row, name: &str) -> DataError {
    let reason = format!("the field {name:?} is missing; {}; name yours under fields.{name}", present(row, name));
    DataError::Field { origin: row.origin.to_string(), reason }
}

fn nothing_known(row: &Row) -> DataError {
    let reason = format!(
        "none of the fields prompt, chosen/rejected, messages, instruction/response, text; {}; name yours under fields",
        present(row, "text")
    );
    DataError::Field { origin: row.origin.to_string(), reason }
}

/// The fields that are there, the nearest spelling to `wanted` pointed out.
fn present(row: &Row, wanted: &str) -> String {
    let mut names: Vec<&str> = row.fields.keys().map(String::as_str).collect();
    if names.is_empty() {
        return "the row has no fields".into();
    }
    names.sort_unstable();
    let nearest = names
        .iter()
        .map(|name| (strsim::damerau_levenshtein(&name.to_lowercase(), wanted), *name))
        .filter(|(distance, name)| *distance > 0 && *distance <= name.len().max(wanted.len()) / 3)
        .min();
    let hint = nearest.map(|(_, name)| format!("; did you mean {name:?}?")).unwrap_or_default();
    let more = names.len().saturating_sub(12);
    names.truncate(12);
    let tail = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("the row has: {}{tail}{hint}", names.join(", "))
}
