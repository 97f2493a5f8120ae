//! What is asked of the generator and what it answers.

use serde::{Deserialize, Serialize};
use tandem_kernels::rng::{Philox, Purpose};
pub use tandem_kernels::sample::SamplingParams;

/// One prompt and how many samples of its continuation are wanted.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The prompt; at least one token.
    pub prompt: Vec<u32>,
    /// Name of each sample wanted; names address the random numbers and must not repeat under one key.
    pub samples: Vec<u64>,
    /// Most tokens of a response.
    pub max_new_tokens: usize,
    /// Tokens that end a response; the token itself belongs to the response.
    pub stop: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
}

/// Why a response ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Finish {
    /// The model emitted a stop token: an end that it chose.
    Stop,
    /// The response reached its limit.
    Length,
}

/// A response to one sample of a request.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// Index of the request.
    pub request: usize,
    /// Name of the sample.
    pub sample: u64,
    /// Tokens of the response, the stop token included.
    pub ids: Vec<u32>,
    /// Log-probability of each token under the policy itself: temperature 1, nothing cut off.
    pub logp: Vec<f32>,
    /// Log-probability of each token under the distribution it was drawn from.
    pub sampling_logp: Vec<f32>,
    /// Why it ended.
    pub finish: Finish,
}

/// Called with (request, sample, token) as tokens come, for streaming.
pub type OnToken<'a> = &'a mut dyn FnMut(usize, u64, u32);

/// Address of the random numbers of one call: equal keys and samples give equal tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SamplingKey {
    /// Seed of the run.
    pub seed: u64,
    /// Step or iteration.
    pub step: u64,
}

impl SamplingKey {
    /// The stream that tokens are drawn from.
    pub(super) fn stream(&self) -> Philox {
        Philox::new(self.seed, Purpose::Sample, self.step)
    }
}
