//! Prompts, responses and conversations as ids.

use super::{Tokenizer, encode_with};
use crate::error::{DataError, Result};
use crate::example::{Demonstration, Message, Prompt};

/// A tokenised sample: `ids[..prompt_len]` is given, the rest is to be learnt (and ends with the end-of-sequence token, unless
/// it was cut).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// Prompt and response, end to end.
    pub ids: Vec<u32>,
    /// How many of them are the prompt.
    pub prompt_len: usize,
}

impl Encoded {
    /// The prompt's ids.
    pub fn prompt(&self) -> &[u32] {
        &self.ids[..self.prompt_len]
    }

    /// The response's ids.
    pub fn response(&self) -> &[u32] {
        &self.ids[self.prompt_len..]
    }
}

impl Tokenizer {
    /// The ids that generation starts from, and that precede the response in training. With a chat template a text is one
    /// user turn; without one it stands as it is, after [`Tokenizer::prefix`].
    ///
    /// # Errors
    /// As [`Tokenizer::encode`]; what the template refuses; a prompt without a single token.
    pub fn encode_prompt(&self, prompt: &Prompt) -> Result<Vec<u32>> {
        let ids = match (prompt, &self.template) {
            (Prompt::Text(text), Some(_)) => self.encode_conversation(&[Message::user(text)], true)?,
            (Prompt::Messages(messages), Some(_)) => self.encode_conversation(messages, true)?,
            (Prompt::Text(text), None) => [self.prefix.clone(), self.encode(text)?].concat(),
            (Prompt::Messages(messages), None) => {
                let turns: Vec<&str> = messages.iter().map(|message| message.content.as_str()).collect();
                [self.prefix.clone(), self.encode(&(turns.join("\n") + "\n"))?].concat()
            }
        };
        if ids.is_empty() {
            return Err(DataError::Text { text: String::new(), reason: "the prompt has no tokens".into() });
        }
        Ok(ids)
    }

    /// A response's ids, with the end-of-sequence token.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_response(&self, response: &str) -> Result<Vec<u32>> {
        let mut ids = self.encode(response)?;
        ids.push(self.special.eos);
        Ok(ids)
    }

    /// A prompt and its response. Without a prompt the response follows [`Tokenizer::prefix`].
    ///
    /// # Errors
    /// As [`Tokenizer::encode_prompt`].
    pub fn encode_pair(&self, prompt: Option<&Prompt>, response: &str) -> Result<Encoded> {
        let mut ids = match prompt {
            Some(prompt) => self.encode_prompt(prompt)?,
            None => self.prefix.clone(),
        };
        let prompt_len = ids.len();
        ids.extend(self.encode_response(response)?);
        Ok(Encoded { ids, prompt_len })
    }

    /// A demonstration to learn.
    ///
    /// # Errors
    /// As [`Tokenizer::encode_prompt`].
    pub fn encode_demonstration(&self, demonstration: &Demonstration) -> Result<Encoded> {
        self.encode_pair(demonstration.prompt.as_ref(), &demonstration.response)
    }

    /// A conversation as the template writes it. The control tokens are the template's own: where a message spells one, it
    /// stays ordinary text.
    ///
    /// # Errors
    /// As [`Tokenizer::encode_prompt`]; there must be a template.
    pub fn encode_conversation(&self, messages: &[Message], add_generation_prompt: bool) -> Result<Vec<u32>> {
        let template = self.template.as_ref().ok_or_else(|| self.wrong("the model has no chat template".into()))?;
        let controls = self.controls();
        let spells_one = |message: &Message| {
            controls.iter().any(|c| message.content.contains(&c.text) || message.role.contains(&c.text))
        };
        if !messages.iter().any(spells_one) {
            return encode_with(&self.control, &template.render(messages, add_generation_prompt)?);
        }
        let stand_ins = StandIns::new(&controls, messages)?;
        let safe: Vec<Message> = messages.iter().map(|message| stand_ins.hide(message)).collect();
        let text = template.render(&safe, add_generation_prompt)?;
        let mut ids = Vec::new();
        for piece in pieces(&text, &controls) {
            match piece {
                Piece::Control(id) => ids.push(id),
                Piece::Text(text) => ids.extend(self.encode(&stand_ins.restore(text))?),
            }
        }
        Ok(ids)
    }

    fn controls(&self) -> Vec<Control> {
        let added = self.control.get_added_tokens_decoder();
        let special = added.into_iter().filter(|(_, token)| token.special);
        let mut controls: Vec<Control> = special
            .map(|(id, token)| Control { id, text: token.content, eats_left: token.lstrip, eats_right: token.rstrip })
            .collect();
        // Of two that begin alike the longer one is meant.
        controls.sort_by(|a, b| b.text.len().cmp(&a.text.len()).then(a.id.cmp(&b.id)));
        controls
    }
}

/// A control token, its spelling, and whether it swallows blanks beside it.
struct Control {
    id: u32,
    text: String,
    eats_left: bool,
    eats_right: bool,
}

enum Piece<'a> {
    Control(u32),
    Text(&'a str),
}

/// Cuts a text at its control tokens.
fn pieces<'a>(text: &'a str, controls: &[Control]) -> Vec<Piece<'a>> {
    let mut pieces = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let found = controls.iter().filter_map(|c| rest.find(&c.text).map(|at| (at, c)));
        // `min_by_key` keeps the first of equals, and the longer spellings come first.
        let Some((at, control)) = found.min_by_key(|(at, _)| *at) else {
            pieces.push(Piece::Text(rest));
            break;
        };
        let before = if control.eats_left { rest[..at].trim_end() } else { &rest[..at] };
        if !before.is_empty() {
            pieces.push(Piece::Text(before));
        }
        pieces.push(Piece::Control(control.id));
        rest = &rest[at + control.text.len()..];
        if control.eats_right {
            rest = rest.trim_start();
        }
    }
    pieces
}

/// Private-use characters that stand for spelled-out control tokens while a template handles the messages.
struct StandIns<'a> {
    controls: &'a [Control],
    first: u32,
}

impl<'a> StandIns<'a> {
    fn new(controls: &'a [Control], messages: &[Message]) -> Result<Self> {
        // Supplementary private use area A; taken only if no message uses any of it.
        const FIRST: u32 = 0xf0000;
        const LAST: u32 = 0xffffd;
        let area = FIRST..=LAST;
        let private = |text: &str| text.chars().any(|character| area.contains(&u32::from(character)));
        if controls.len() > area.clone().count() || messages.iter().any(|m| private(&m.content) || private(&m.role)) {
            let reason = "it spells a control token and uses private-use characters; remove one of them".into();
            return Err(DataError::Text { text: messages[0].content.chars().take(60).collect(), reason });
        }
        Ok(Self { controls, first: FIRST })
    }

    fn hide(&self, message: &Message) -> Message {
        let hide = |text: &str| {
            let mut hidden = text.to_owned();
            for (index, control) in self.controls.iter().enumerate() {
                hidden = hidden.replace(&control.text, &self.stand_in(index));
            }
            hidden
        };
        Message { role: hide(&message.role), content: hide(&message.content) }
    }

    fn restore(&self, text: &str) -> String {
        let mut restored = String::with_capacity(text.len());
        for character in text.chars() {
            let index = u32::from(character).checked_sub(self.first).map(|index| index as usize);
            match index.and_then(|index| self.controls.get(index)) {
                Some(control) => restored.push_str(&control.text),
                None => restored.push(character),
            }
        }
        restored
    }

    fn stand_in(&self, index: usize) -> String {
        char::from_u32(self.first + index as u32).map(String::from).unwrap_or_default()
    }
}
