//! What PPO has lived through: prompts, sampled responses and what was measured of them, as Parquet.
//!
//! One row per sample; facts only (advantages are derived from them, never stored). The files open in pandas, polars and
//! DuckDB, and floats come back bit for bit: a run that was interrupted trains on exactly what it had sampled.

mod read;
mod schema;
mod write;

use serde::{Deserialize, Serialize};

pub use read::read_parquet;
pub use schema::schema;
pub use write::{to_parquet, write_parquet};

/// Why a response ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The model chose the end-of-sequence token; it is the last of `response_ids`.
    Eos,
    /// The response reached the largest number of tokens.
    Length,
    /// A stop text appeared.
    Stop,
}

impl Finish {
    /// The word in the `finish` column.
    pub fn as_str(self) -> &'static str {
        match self {
            Finish::Eos => "eos",
            Finish::Length => "length",
            Finish::Stop => "stop",
        }
    }

    fn parse(word: &str) -> Option<Self> {
        [Finish::Eos, Finish::Length, Finish::Stop].into_iter().find(|finish| finish.as_str() == word)
    }
}

/// One sampled response. The lists `logp`, `ref_logp` and `value` have one number per token of `response_ids`.
#[derive(Debug, Clone, PartialEq)]
pub struct ExperienceRow {
    /// The sample's number in the run.
    pub sample: u64,
    /// The PPO iteration it was sampled in.
    pub iteration: u32,
    /// Optimizer steps that the policy had made when it was sampled.
    pub policy_step: u64,
    /// The prompt.
    pub prompt_ids: Vec<u32>,
    /// The response, with its end-of-sequence token if it has one.
    pub response_ids: Vec<u32>,
    /// Log-probability of each response token under the policy that sampled it, nats, at temperature 1; where a copy of the
    /// policy in another number format has sampled, under the policy itself.
    pub logp: Vec<f32>,
    /// The same under the reference model.
    pub ref_logp: Vec<f32>,
    /// The critic's value before each response token.
    pub value: Vec<f32>,
    /// The score of the whole response, before any KL penalty.
    pub score: f32,
    /// Why it ended.
    pub finish: Finish,
    /// The prompt as text, for readers.
    pub prompt_text: String,
    /// The response as text.
    pub response_text: String,
}

impl ExperienceRow {
    /// Whether all lists have the lengths they must have; else what is wrong.
    fn check(&self) -> Result<(), String> {
        let tokens = self.response_ids.len();
        if self.prompt_ids.is_empty() || tokens == 0 {
            return Err(format!("sample {}: prompt_ids and response_ids must not be empty", self.sample));
        }
        for (name, list) in [("logp", &self.logp), ("ref_logp", &self.ref_logp), ("value", &self.value)] {
            if list.len() != tokens {
                return Err(format!("sample {}: {name} has {} numbers for {tokens} tokens", self.sample, list.len()));
            }
        }
        Ok(())
    }
}
