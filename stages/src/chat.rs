//! Talking to a model: one prompt, or turn by turn, with the answer appearing as it is written.

use std::fs;
use std::io::{self, BufRead, IsTerminal, Write};
use std::path::Path;

use clap::Parser;
use serde_json::Value;
use tandem_data::hub::resolve_model;
use tandem_data::{DataError, Message, Prompt, Tokenizer};
use tandem_engine::Model;
use tandem_engine::generate::{Request, SamplingKey, generate};
use tandem_engine::model::unit::Head;

use crate::cli::{Outcome, set_threads};
use crate::config::{GenerationConfig, SamplingConfig};
use crate::error::Result;
use crate::models;
use crate::monitor::printable;

/// Tokens of the prompt that are read at once.
const PREFILL_TOKENS: usize = 2048;
const HELP: &str = "/reset starts a new conversation, /exit (or the end of input) ends";

/// Talk to a model: a folder that a stage has exported, a GGUF file, or a hub id.
///
/// A model with a chat template keeps the conversation in mind; one without continues each line as it stands. How it answers
/// is taken from its generation_config.json unless said otherwise here.
#[derive(Debug, Clone, Parser)]
#[command(version)]
pub struct ChatArgs {
    /// The model.
    pub model: String,
    /// Answer this and end.
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// Instructions that precede the conversation.
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Most tokens in an answer.
    #[arg(long, value_name = "COUNT")]
    pub max_new_tokens: Option<usize>,
    /// Divides the logits; 0 takes the most probable token.
    #[arg(long, value_name = "NUMBER")]
    pub temperature: Option<f64>,
    /// Keep only so many of the most probable tokens; 0 keeps all.
    #[arg(long, value_name = "COUNT")]
    pub top_k: Option<usize>,
    /// Keep the most probable tokens up to this probability together; 1 keeps all.
    #[arg(long, value_name = "NUMBER")]
    pub top_p: Option<f64>,
    /// Keep tokens at least so many times as probable as the most probable one; 0 keeps all.
    #[arg(long, value_name = "NUMBER")]
    pub min_p: Option<f64>,
    /// Makes tokens already present less likely; 1 changes nothing.
    #[arg(long, value_name = "NUMBER")]
    pub repetition_penalty: Option<f64>,
    /// The random numbers follow from it: equal seeds, equal answers.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Threads to compute with; left out: one per core.
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
}

impl ChatArgs {
    /// How the model answers: as said here, else as `defaults` say.
    fn generation(&self, defaults: &GenerationConfig) -> Result<GenerationConfig> {
        let sampling = &defaults.sampling;
        let generation = GenerationConfig {
            max_new_tokens: self.max_new_tokens.unwrap_or(defaults.max_new_tokens),
            sampling: SamplingConfig {
                temperature: self.temperature.unwrap_or(sampling.temperature),
                top_k: self.top_k.unwrap_or(sampling.top_k),
                top_p: self.top_p.unwrap_or(sampling.top_p),
                min_p: self.min_p.unwrap_or(sampling.min_p),
                repetition_penalty: self.repetition_penalty.unwrap_or(sampling.repetition_penalty),
            },
        };
        Ok(generation.checked()?)
    }
}

/// Answers `args.prompt`, or reads turns from standard input.
///
/// # Errors
/// If the model cannot be loaded, and in one-shot use if the prompt cannot be answered.
pub fn run(args: &ChatArgs) -> Result<Outcome> {
    set_threads(args.threads.map(usize::from))?;
    let path = resolve_model(&args.model)?;
    let generation = args.generation(&defaults(&path)?)?;
    let loaded = models::load(&args.model, Head::Language)?;
    let mut conversation = Conversation {
        model: loaded.blueprint.model()?,
        tokenizer: loaded.tokenizer,
        generation,
        seed: args.seed,
        turn: 0,
        messages: Vec::new(),
        system: args.system.clone(),
    };
    if conversation.system.is_some() && conversation.tokenizer.template().is_none() {
        let reason = format!("{} has no chat template, so nothing can precede the text", args.model);
        return Err(DataError::Setting { what: "--system".into(), reason }.into());
    }
    conversation.reset();
    match &args.prompt {
        Some(prompt) => conversation.answer(prompt, &mut io::stdout())?,
        None => conversation.talk(&mut io::stdin().lock(), &mut io::stdout(), io::stdin().is_terminal()),
    }
    Ok(Outcome::Finished)
}

/// What the model's `generation_config.json` says, in the keys of transformers; what it leaves open is as in `[generation]`.
fn defaults(model: &Path) -> Result<GenerationConfig> {
    let path = model.join("generation_config.json");
    if !path.is_file() {
        return Ok(GenerationConfig::default());
    }
    let text = fs::read_to_string(&path).map_err(|source| DataError::Io { path: path.clone(), source })?;
    let given: Value = serde_json::from_str(&text).map_err(|error| DataError::Setting {
        what: path.display().to_string(),
        reason: format!("it is not JSON: {error}"),
    })?;
    Ok(from_transformers(&given))
}

fn from_transformers(given: &Value) -> GenerationConfig {
    let GenerationConfig { max_new_tokens, sampling } = GenerationConfig::default();
    let number = |key: &str, default: f64| given[key].as_f64().unwrap_or(default);
    let count = |key: &str, default: usize| given[key].as_u64().map_or(default, |count| count as usize);
    let greedy = given["do_sample"] == Value::Bool(false);
    GenerationConfig {
        max_new_tokens: count("max_new_tokens", max_new_tokens),
        sampling: SamplingConfig {
            temperature: if greedy { 0.0 } else { number("temperature", sampling.temperature) },
            top_k: count("top_k", sampling.top_k),
            top_p: number("top_p", sampling.top_p),
            min_p: number("min_p", sampling.min_p),
            repetition_penalty: number("repetition_penalty", sampling.repetition_penalty),
        },
    }
}

/// A model and what has been said so far.
struct Conversation {
    model: Model,
    tokenizer: Tokenizer,
    generation: GenerationConfig,
    seed: u64,
    turn: u64,
    messages: Vec<Message>,
    system: Option<String>,
}

impl Conversation {
    /// Forgets all but the instructions.
    fn reset(&mut self) {
        self.messages = self.system.iter().map(Message::system).collect();
    }

    /// Answers line by line until the input ends. What cannot be answered is said, and the conversation goes on.
    fn talk(&mut self, input: &mut dyn BufRead, output: &mut dyn Write, on_terminal: bool) {
        if on_terminal {
            eprintln!("{HELP}");
        }
        loop {
            if on_terminal {
                show(output, "> ");
            }
            let mut line = String::new();
            match input.read_line(&mut line) {
                Ok(1..) => {}
                Ok(0) => return,
                Err(error) => return eprintln!("cannot read the input: {error}"),
            }
            match line.trim() {
                "" => {}
                "/exit" | "/quit" => return,
                "/reset" => self.reset(),
                text => {
                    if let Err(error) = self.answer(text, output) {
                        eprintln!("error: {error}");
                    }
                }
            }
        }
    }

    /// Answers `text`, writing the answer as it comes; afterwards both are part of the conversation.
    fn answer(&mut self, text: &str, output: &mut dyn Write) -> Result<()> {
        let prompt = match self.tokenizer.template() {
            Some(_) => Prompt::Messages([self.messages.as_slice(), &[Message::user(text)]].concat()),
            None => Prompt::Text(text.to_owned()),
        };
        let ids = self.tokenizer.encode_prompt(&prompt)?;
        let limit = self.model.spec().max_positions;
        if ids.len() >= limit {
            let reason = format!("it has {} tokens and the model takes {limit}; /reset starts a new one", ids.len());
            return Err(DataError::Setting { what: "the conversation".into(), reason }.into());
        }
        let request = Request {
            max_new_tokens: self.generation.max_new_tokens.min(limit - ids.len()),
            prompt: ids,
            samples: vec![0],
            stop: self.tokenizer.stop_ids().to_vec(),
            sampling: self.generation.sampling.params(),
        };
        let answer = self.stream(&request, output)?;
        self.turn += 1;
        if let Prompt::Messages(messages) = prompt {
            self.messages = messages;
            self.messages.push(Message::assistant(answer));
        }
        Ok(())
    }

    /// Generates, writing text as soon as it is final; returns all of it.
    fn stream(&self, request: &Request, output: &mut dyn Write) -> Result<String> {
        let mut decoder = self.tokenizer.stream();
        let mut answer = String::new();
        let mut failed = None;
        let mut write = |text: &str| {
            // A model of whole texts begins its answer with the blank between words.
            let text = if answer.is_empty() { text.trim_start() } else { text };
            answer.push_str(text);
            show(output, text);
        };
        let key = SamplingKey { seed: self.seed, step: self.turn };
        generate(&self.model, std::slice::from_ref(request), 1, PREFILL_TOKENS, key, &mut |_, _, token| {
            if failed.is_none() && !request.stop.contains(&token) {
                match decoder.push(token) {
                    Ok(text) => write(&text),
                    Err(error) => failed = Some(error),
                }
            }
        })?;
        match failed {
            Some(error) => return Err(error.into()),
            None => write(&decoder.finish()?),
        }
        show(output, "\n");
        Ok(answer)
    }
}

/// Writes at once. Line breaks and tabs stay; what could command a terminal does not. An output that is closed is no error.
fn show(output: &mut dyn Write, text: &str) {
    for part in text.split_inclusive(['\n', '\t']) {
        let (plain, end) = match part.char_indices().next_back() {
            Some((at, '\n' | '\t')) => part.split_at(at),
            _ => (part, ""),
        };
        let _ = write!(output, "{}{end}", printable(plain));
    }
    let _ = output.flush();
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use serde_json::json;

    use super::*;

    fn args(line: &[&str]) -> ChatArgs {
        ChatArgs::try_parse_from([&["chat", "model"], line].concat()).unwrap()
    }

    #[test]
    fn arguments_come_before_the_models_own_settings() {
        ChatArgs::command().debug_assert();
        let own =
            from_transformers(&json!({ "max_new_tokens": 9, "temperature": 0.6, "top_k": 50, "do_sample": true }));
        assert_eq!((own.max_new_tokens, own.sampling.top_k), (9, 50));
        let generation = args(&["--temperature", "0.1", "--top-p", "0.5"]).generation(&own).unwrap();
        assert_eq!((generation.sampling.temperature, generation.sampling.top_p), (0.1, 0.5));
        assert_eq!(generation.sampling.top_k, 50);
        assert_eq!(from_transformers(&json!({ "do_sample": false, "temperature": 2 })).sampling.temperature, 0.0);
        assert_eq!(from_transformers(&Value::Null), GenerationConfig::default());
    }

    #[test]
    fn impossible_settings_are_refused() {
        for line in [["--top-p", "0"], ["--temperature", "NaN"], ["--max-new-tokens", "0"]] {
            let error = args(&line).generation(&GenerationConfig::default()).unwrap_err();
            assert_eq!(error.exit_code(), crate::error::ExitCode::Config, "{error}");
        }
    }

    #[test]
    fn nothing_commands_the_terminal() {
        let mut written = Vec::new();
        show(&mut written, "a\nb\t\x1b[2Jc");
        assert_eq!(String::from_utf8(written).unwrap(), "a\nb\t\\u{1b}[2Jc");
    }
}
