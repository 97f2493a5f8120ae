//! Choosing the next token from a row of logits, given a uniform number.
//!
//! The steps and their order are those of `transformers`' logits processors: repetition penalty (Keskar et al., CTRL,
//! 2019), temperature, top-k (Fan et al., 2018), top-p (Holtzman et al., 2020), min-p (Nguyen et al., 2024). Entries of
//! equal logit rank by their id, lowest first, so exactly `top_k` remain. The choice inverts the cumulative distribution
//! in order of ids, summed in one fixed order.
//!
//! A row whose vocabulary is cut over ranks is sampled without gathering it: see [`ShardDraw`] for the steps.

mod distribution;
mod params;
mod shard;

use candle_core::Tensor;
use rayon::prelude::*;

pub use params::SamplingParams;
pub use shard::{
    Candidate, ChosenBlock, Exchange, ShardDraw, ShardSummary, choose_block, choose_candidate, finish,
    sample_row_gathered, sample_row_sharded,
};

use crate::error::check_dims;
use crate::profile::{Class, time};
use crate::view::view;
use crate::{Error, Result};

/// A chosen token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampled {
    /// The token.
    pub token: u32,
    /// Its log-probability under the logits as they came: the policy's own, bit for bit that of
    /// [`crate::logprob::head_logprob`].
    pub logp: f32,
    /// Its log-probability under the distribution it was drawn from; 0 if the choice was greedy.
    pub sampling_logp: f32,
    /// Entropy of the policy's own distribution in nats.
    pub entropy: f32,
}

/// One row's part of a call of [`sample_rows`].
#[derive(Clone, Copy, Debug)]
pub struct SampleRequest<'a> {
    /// Tokens so far, which the repetition penalty applies to.
    pub history: &'a [u32],
    /// How to sample.
    pub params: &'a SamplingParams,
    /// A uniform number in `[0, 1)`.
    pub uniform: f64,
}

/// [`sample_row`] for each row of `logits`, `[N, V]`, in parallel.
pub fn sample_rows(logits: &Tensor, requests: &[SampleRequest]) -> Result<Vec<Sampled>> {
    let _timer = time(Class::Sample, 0);
    const OP: &str = "sample_rows";
    let &[_, vocabulary] = logits.dims() else {
        return Err(Error::shape(OP, "logits", "[N, V]", logits.dims()));
    };
    check_dims(OP, "logits", &[requests.len(), vocabulary], logits.dims())?;
    if vocabulary == 0 {
        return Err(Error::shape(OP, "logits", "[N, V] with V at least 1", logits.dims()));
    }
    let logits = view(OP, logits)?;
    let rows = logits.par_chunks(vocabulary).zip(requests);
    rows.map(|(row, request)| sample_row(row, request.history, request.params, request.uniform)).collect()
}

/// Chooses a token from one row of finite logits.
///
/// `history`: tokens so far, for the repetition penalty. `uniform`: in `[0, 1)`; equal numbers give equal tokens.
pub fn sample_row(logits: &[f32], history: &[u32], params: &SamplingParams, uniform: f64) -> Result<Sampled> {
    shard::sample("sample_row", &[logits], history, params, uniform)
}
