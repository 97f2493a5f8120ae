//! Chat templates: how a model wants a conversation written.
//!
//! A template is a Jinja program that comes with a model, so it is run like a stranger's program: a limit on its steps (fuel), on
//! every value it builds (`guard.rs`), on its output, and no functions that reach outside. What a hostile one can still do is
//! waste some minutes of one core, within about 100 MiB. It sees what `transformers` gives it: `messages`, `add_generation_prompt`, `bos_token`, `eos_token`, …, `raise_exception` and `strftime_now`.

mod builtins;
mod guard;

use minijinja::{Environment, ErrorKind, Value, context};

use crate::error::{DataError, Result};
use crate::example::Message;
use crate::limits;

/// The strings of the special tokens that templates write, by the names they use for them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TemplateTokens {
    /// `bos_token`, empty if the model has none.
    pub bos: String,
    /// `eos_token`.
    pub eos: String,
    /// `unk_token`.
    pub unk: String,
    /// `pad_token`.
    pub pad: String,
}

/// A compiled chat template.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    origin: String,
    source: String,
    tokens: TemplateTokens,
    environment: Environment<'static>,
}

const NAME: &str = "chat";

impl ChatTemplate {
    /// Compiles a template. `origin` is the file it came from, for messages.
    ///
    /// # Errors
    /// Syntax errors, and the few constructs that are refused because their memory could not be bounded (see
    /// [`crate::template`]).
    pub fn new(origin: impl Into<String>, source: impl Into<String>, tokens: TemplateTokens) -> Result<Self> {
        let (origin, source) = (origin.into(), source.into());
        let wrong = |reason: String| DataError::Template { origin: origin.clone(), reason };
        if source.len() > limits::TEMPLATE_BYTES {
            let reason = format!("it is {} bytes long, more than the {} allowed", source.len(), limits::TEMPLATE_BYTES);
            return Err(wrong(reason));
        }
        let guarded = guard::instrument(&source).map_err(wrong)?;
        let mut environment = builtins::environment();
        // Raw text is copied without passing the guard, at most once per unit of fuel.
        let copies = limits::TEMPLATE_TEXT_BYTES / guarded.longest_text.max(1);
        environment.set_fuel(Some(limits::TEMPLATE_FUEL.min(copies as u64)));
        environment.add_template_owned(NAME, guarded.source).map_err(|error| wrong(describe(&error)))?;
        Ok(Self { origin, source, tokens, environment })
    }

    /// The template's own text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Writes a conversation. With `add_generation_prompt` the text ends where the assistant's next turn begins.
    ///
    /// # Errors
    /// The template refuses the conversation (unknown role, wrong order), fails, or passes a limit.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let wrong = |reason: String| DataError::Template { origin: self.origin.clone(), reason };
        let size: usize = messages.iter().map(|message| message.role.len() + message.content.len()).sum();
        if size > limits::TEXT_BYTES {
            return Err(wrong(format!(
                "the conversation has {size} bytes, more than the {} allowed",
                limits::TEXT_BYTES
            )));
        }
        let turns = messages.iter().map(|message| {
            context! { role => message.role.as_str(), content => message.content.as_str() }
        });
        let context = context! {
            messages => turns.collect::<Vec<Value>>(),
            add_generation_prompt,
            bos_token => self.tokens.bos.as_str(),
            eos_token => self.tokens.eos.as_str(),
            unk_token => self.tokens.unk.as_str(),
            pad_token => self.tokens.pad.as_str(),
            // `transformers` passes these as None, and `x is not none` is true of what is not defined at all.
            tools => (),
            documents => (),
        };
        let template = self.environment.get_template(NAME).map_err(|error| wrong(describe(&error)))?;
        let text = template.render(context).map_err(|error| wrong(describe(&error)))?;
        if text.len() > limits::TEMPLATE_VALUE_BYTES {
            return Err(wrong(format!(
                "it wrote {} bytes, more than the {} allowed",
                text.len(),
                limits::TEMPLATE_VALUE_BYTES
            )));
        }
        Ok(text)
    }
}

fn describe(error: &minijinja::Error) -> String {
    match error.kind() {
        ErrorKind::OutOfFuel => "it takes more steps than allowed; does it loop without end?".into(),
        ErrorKind::SyntaxError => {
            format!("line {}: {}", error.line().unwrap_or(0), error.detail().unwrap_or("syntax error"))
        }
        _ => match (error.detail(), error.line()) {
            (Some(detail), Some(line)) => format!("line {line}: {detail}"),
            (Some(detail), None) => detail.to_owned(),
            _ => error.to_string(),
        },
    }
}
