//! What a row says once its fields are known, and what each stage takes from it.

use serde::{Deserialize, Serialize};

use crate::error::{DataError, Result};

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`, or what the model's template knows.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A turn of the user.
    pub fn user(content: impl Into<String>) -> Self {
        Self { role: "user".into(), content: content.into() }
    }

    /// A turn of the assistant.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self { role: "assistant".into(), content: content.into() }
    }

    /// The instructions that precede a conversation.
    pub fn system(content: impl Into<String>) -> Self {
        Self { role: "system".into(), content: content.into() }
    }
}

/// What a response answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Prompt {
    /// A text. Under a chat template it is one user turn; without one the response is appended to it as it stands.
    Text(String),
    /// A conversation that the assistant is to continue.
    Messages(Vec<Message>),
}

/// A row, understood.
#[derive(Debug, Clone, PartialEq)]
pub enum Example {
    /// A text without parts, perhaps rated.
    Text {
        /// The text.
        text: String,
        /// The human rating, in the data's own scale.
        rating: Option<f32>,
    },
    /// Two responses of which the first was preferred.
    Pair {
        /// What both answer.
        prompt: Prompt,
        /// The preferred response.
        chosen: String,
        /// The other.
        rejected: String,
        /// By how much, if the data says.
        margin: Option<f32>,
    },
    /// A response to a prompt.
    Response {
        /// The prompt.
        prompt: Prompt,
        /// The response.
        response: String,
    },
    /// A conversation.
    Chat {
        /// Its turns.
        messages: Vec<Message>,
    },
    /// A prompt alone.
    Prompt {
        /// The prompt.
        prompt: Prompt,
    },
}

/// A text to learn: a prompt and a response, or a response alone (`prompt` is `None`) that is learnt from its first token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Demonstration {
    /// What is answered.
    pub prompt: Option<Prompt>,
    /// What is to be learnt.
    pub response: String,
}

/// A pair to compare.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// What both responses answer.
    pub prompt: Option<Prompt>,
    /// The preferred response.
    pub chosen: String,
    /// The other.
    pub rejected: String,
    /// By how much, if known.
    pub margin: Option<f32>,
}

impl Example {
    /// What kind of row this is, in the words of the field names.
    pub fn kind(&self) -> &'static str {
        match self {
            Example::Text { .. } => "text",
            Example::Pair { .. } => "prompt/chosen/rejected",
            Example::Response { .. } => "prompt/response",
            Example::Chat { .. } => "messages",
            Example::Prompt { .. } => "prompt",
        }
    }

    /// For fine-tuning: the response of a pair is the chosen one, that of a conversation its last assistant turn.
    ///
    /// # Errors
    /// A bare prompt, or a conversation without an assistant turn, has no response to learn.
    pub fn into_demonstration(self, origin: &crate::row::Origin) -> Result<Demonstration> {
        let (prompt, response) = match self {
            Example::Text { text, .. } => (None, text),
            Example::Pair { prompt, chosen, .. } => (Some(prompt), chosen),
            Example::Response { prompt, response } => (Some(prompt), response),
            Example::Chat { messages } => {
                let last = messages.iter().rposition(|message| message.role == "assistant");
                let Some(last) = last.filter(|&last| last > 0) else {
                    return Err(unfit(origin, "the messages hold no assistant turn that answers something"));
                };
                let mut messages = messages;
                messages.truncate(last + 1);
                let response = messages.pop().map(|message| message.content).unwrap_or_default();
                (Some(Prompt::Messages(messages)), response)
            }
            Example::Prompt { .. } => {
                return Err(unfit(
                    origin,
                    "a prompt without a response; fine-tuning needs a response, chosen or text field",
                ));
            }
        };
        Ok(Demonstration { prompt, response })
    }

    /// For reward models.
    ///
    /// # Errors
    /// Only pairs hold a comparison.
    pub fn into_comparison(self, origin: &crate::row::Origin) -> Result<Comparison> {
        match self {
            Example::Pair { prompt, chosen, rejected, margin } => {
                Ok(Comparison { prompt: Some(prompt), chosen, rejected, margin })
            }
            other => {
                Err(unfit(origin, &format!("a {} row; comparisons need chosen and rejected fields", other.kind())))
            }
        }
    }

    /// For PPO: what is to be answered. Of a conversation, the turns before its last assistant turn if it ends with one.
    ///
    /// # Errors
    /// A plain text has no prompt.
    pub fn into_prompt(self, origin: &crate::row::Origin) -> Result<Prompt> {
        match self {
            Example::Pair { prompt, .. } | Example::Response { prompt, .. } | Example::Prompt { prompt } => Ok(prompt),
            Example::Chat { mut messages } => {
                if messages.last().is_some_and(|message| message.role == "assistant") {
                    messages.pop();
                }
                if messages.is_empty() {
                    return Err(unfit(origin, "the messages hold nothing to answer"));
                }
                Ok(Prompt::Messages(messages))
            }
            Example::Text { .. } => {
                Err(unfit(origin, "a text row; prompts need a prompt, instruction or messages field"))
            }
        }
    }
}

fn unfit(origin: &crate::row::Origin, reason: &str) -> DataError {
    DataError::Field { origin: origin.to_string(), reason: reason.to_owned() }
}
