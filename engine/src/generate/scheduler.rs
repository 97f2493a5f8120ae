//! Continuous batching: who is prefilled, who decodes, and whose slot is free again.

use std::collections::VecDeque;

use candle_core::Tensor;
use tandem_kernels::rng::Philox;
use tandem_kernels::sample::{SampleRequest, Sampled};

use super::awake::awake;
use super::request::{Completion, Finish, OnToken, Request, SamplingKey};
use super::{CacheSize, KvCache};
use crate::batch::Packed;
use crate::model::Model;
use crate::{Error, Result};

/// Answers requests with one model and one cache.
pub struct Scheduler<'a> {
    model: &'a Model,
    cache: &'a KvCache,
    stream: Philox,
    prefill_tokens: usize,
}

/// A sequence that occupies a slot.
struct Active {
    slot: usize,
    request: usize,
    sample: u64,
    /// Prompt and response so far.
    ids: Vec<u32>,
    logp: Vec<f32>,
    sampling_logp: Vec<f32>,
    finish: Option<Finish>,
}

/// The last prompt row of a request as it enters the head, kept while samples of it still wait for a slot.
struct Prefilled {
    request: usize,
    row: Tensor,
}

/// Answers `requests` with a cache made for the purpose and dropped after: for evaluation and for frozen models.
///
/// # Errors
/// As [`Scheduler::run`].
pub fn generate(
    model: &Model,
    requests: &[Request],
    slots: usize,
    prefill_tokens: usize,
    key: SamplingKey,
    on_token: OnToken<'_>,
) -> Result<Vec<Completion>> {
    let max_len = requests.iter().map(|r| r.prompt.len() + r.max_new_tokens).max().unwrap_or(1);
    let samples: usize = requests.iter().map(|r| r.samples.len()).sum();
    let size = CacheSize { slots: slots.clamp(1, samples.max(1)), max_len };
    let cache = KvCache::new(model, size)?;
    model.keep_packed(true);
    let completions = Scheduler::new(model, &cache, key, prefill_tokens).run(requests, on_token);
    model.keep_packed(false);
    completions
}

impl<'a> Scheduler<'a> {
    /// A scheduler that reads prompts in batches of up to `prefill_tokens` tokens (a longer prompt goes alone).
    pub fn new(model: &'a Model, cache: &'a KvCache, key: SamplingKey, prefill_tokens: usize) -> Self {
        Self { model, cache, stream: key.stream(), prefill_tokens }
    }

    /// Answers every sample of every request, in the order of the requests and their samples.
    ///
    /// # Errors
    /// If a request is empty, too long for the model or the cache, or asks for impossible sampling.
    pub fn run(&self, requests: &[Request], on_token: OnToken<'_>) -> Result<Vec<Completion>> {
        self.check(requests)?;
        let mut waiting: VecDeque<(usize, u64)> =
            requests.iter().enumerate().flat_map(|(r, request)| request.samples.iter().map(move |&s| (r, s))).collect();
        let mut free: Vec<usize> = (0..self.cache.size().slots).rev().collect();
        let mut active: Vec<Active> = Vec::new();
        let mut prefilled: Option<Prefilled> = None;
        let mut done = Vec::with_capacity(waiting.len());
        while !waiting.is_empty() || !active.is_empty() {
            self.admit(requests, &mut waiting, &mut free, &mut active, &mut prefilled, on_token)?;
            self.decode(requests, &mut active, on_token)?;
            active.retain_mut(|sequence| match sequence.finish {
                None => true,
                Some(finish) => {
                    free.push(sequence.slot);
                    done.push(sequence.complete(requests, finish));
                    false
                }
            });
        }
        done.sort_by_key(|completion| {
            let samples = &requests[completion.request].samples;
            (completion.request, samples.iter().position(|&sample| sample == completion.sample))
        });
        Ok(done)
    }

    fn check(&self, requests: &[Request]) -> Result<()> {
        let limit = self.cache.size().max_len.min(self.model.spec().max_positions);
        for (request, r) in requests.iter().enumerate() {
            let refuse = |reason: String| Err(Error::Request { request, reason });
            if r.prompt.is_empty() {
                return refuse("the prompt has no token; give it at least a start token".into());
            }
            if r.max_new_tokens == 0 {
                return refuse("max_new_tokens is 0".into());
            }
            if r.prompt.len() + r.max_new_tokens > limit {
                return refuse(format!(
                    "{} prompt tokens and up to {} new ones exceed the limit of {limit}; shorten one of them",
                    r.prompt.len(),
                    r.max_new_tokens
                ));
            }
            r.sampling.validate()?;
        }
        Ok(())
    }

    /// Gives free slots to waiting samples: prefills their prompts, packed, and draws each first token.
    fn admit(
        &self,
        requests: &[Request],
        waiting: &mut VecDeque<(usize, u64)>,
        free: &mut Vec<usize>,
        active: &mut Vec<Active>,
        prefilled: &mut Option<Prefilled>,
        on_token: OnToken<'_>,
    ) -> Result<()> {
        let first_new = active.len();
        // Prompt rows to draw first tokens from: those of this round's prefill, then one kept from an earlier round.
        let mut batch = Packed::new();
        let mut batch_slots = Vec::new();
        let mut rows: Vec<Source> = Vec::new();
        while let Some(&(request, sample)) = waiting.front() {
            let Some(slot) = free.pop() else { break };
            let prompt = &requests[request].prompt;
            let holder = active.iter().find(|a| a.request == request).map(|a| a.slot);
            let source = match (rows.last().copied(), prefilled.as_ref(), holder) {
                // The prompt is in this round's prefill.
                (Some(Source::Batch(index)), ..) if active.last().is_some_and(|a| a.request == request) => {
                    Source::Batch(index)
                }
                // Or in a slot that still answers another sample of it.
                (_, Some(kept), Some(from)) if kept.request == request => {
                    self.cache.copy_prefix(from, slot, prompt.len())?;
                    Source::Kept
                }
                _ if batch.tokens() > 0 && batch.tokens() + prompt.len() > self.prefill_tokens => {
                    free.push(slot);
                    break;
                }
                _ => {
                    batch.push(prompt, sample);
                    batch_slots.push(slot);
                    Source::Batch(batch_slots.len() - 1)
                }
            };
            waiting.pop_front();
            rows.push(source);
            active.push(Active {
                slot,
                request,
                sample,
                ids: prompt.clone(),
                logp: Vec::new(),
                sampling_logp: Vec::new(),
                finish: None,
            });
        }
        if rows.is_empty() {
            return Ok(());
        }
        let h = if batch_slots.is_empty() {
            None
        } else {
            let h = self.model.prefill(&batch, &self.cache.layers, &batch_slots)?;
            for (sequence, source) in active[first_new..].iter().zip(&rows) {
                if let Source::Batch(index) = *source
                    && batch_slots[index] != sequence.slot
                {
                    self.cache.copy_prefix(batch_slots[index], sequence.slot, sequence.ids.len())?;
                }
            }
            Some(h)
        };
        let row = |source: &Source| -> Result<Tensor> {
            match (*source, &h, prefilled.as_ref()) {
                (Source::Batch(index), Some(h), _) => Ok(h.narrow(0, index, 1)?),
                (Source::Kept, _, Some(kept)) => Ok(kept.row.clone()),
                _ => unreachable!("a row comes from this prefill or from the kept one"),
            }
        };
        let heads = rows.iter().map(row).collect::<Result<Vec<_>>>()?;
        let logits = self.model.head_logits(&Tensor::cat(&heads, 0)?.contiguous()?)?;
        let mut new: Vec<&mut Active> = active[first_new..].iter_mut().collect();
        let sampled = self.model.choose(&logits, &self.draws(requests, &new))?;
        hand_out(requests, &mut new, &sampled, on_token);
        // Samples of the last prompt may still wait for a slot.
        *prefilled = match (waiting.front(), active.last(), heads.last()) {
            (Some(&(next, _)), Some(last), Some(row)) if next == last.request => {
                Some(Prefilled { request: next, row: row.copy()? })
            }
            _ => None,
        };
        Ok(())
    }

    /// One token for every sequence that has not ended.
    fn decode(&self, requests: &[Request], active: &mut [Active], on_token: OnToken<'_>) -> Result<()> {
        // `admit` may already have ended some with their first token.
        let running: Vec<usize> = (0..active.len()).filter(|&i| active[i].finish.is_none()).collect();
        if running.is_empty() {
            return Ok(());
        }
        let places: Vec<(usize, usize)> = running.iter().map(|&i| (active[i].slot, active[i].ids.len() - 1)).collect();
        let ids: Vec<u32> = running.iter().map(|&i| active[i].ids[active[i].ids.len() - 1]).collect();
        let mut still: Vec<&mut Active> = active.iter_mut().filter(|sequence| sequence.finish.is_none()).collect();
        let draws = self.draws(requests, &still);
        let sampled = awake(|| {
            let h = self.model.decode(&ids, &places, &self.cache.layers)?;
            self.model.choose(&self.model.head_logits(&h)?, &draws)
        })?;
        hand_out(requests, &mut still, &sampled, on_token);
        Ok(())
    }

    /// What the next token of each sequence is drawn with.
    fn draws<'b>(&self, requests: &'b [Request], sequences: &'b [&mut Active]) -> Vec<SampleRequest<'b>> {
        let draw = |sequence: &'b &mut Active| SampleRequest {
            history: &sequence.ids,
            params: &requests[sequence.request].sampling,
            uniform: self.stream.uniform(sequence.sample, sequence.ids.len() as u32, 0),
        };
        sequences.iter().map(draw).collect()
    }
}

/// Gives each sequence its next token.
fn hand_out(requests: &[Request], sequences: &mut [&mut Active], sampled: &[Sampled], on_token: OnToken<'_>) {
    for (sequence, chosen) in sequences.iter_mut().zip(sampled) {
        sequence.take(&requests[sequence.request], *chosen);
        on_token(sequence.request, sequence.sample, chosen.token);
    }
}

/// Where the last prompt row of a sample comes from.
#[derive(Clone, Copy)]
enum Source {
    /// Sequence of this round's prefill.
    Batch(usize),
    /// The row kept from an earlier round.
    Kept,
}

impl Active {
    fn take(&mut self, request: &Request, chosen: Sampled) {
        self.ids.push(chosen.token);
        self.logp.push(chosen.logp);
        self.sampling_logp.push(chosen.sampling_logp);
        if request.stop.contains(&chosen.token) {
            self.finish = Some(Finish::Stop);
        } else if self.logp.len() == request.max_new_tokens {
            self.finish = Some(Finish::Length);
        }
    }

    fn complete(&mut self, requests: &[Request], finish: Finish) -> Completion {
        Completion {
            request: self.request,
            sample: self.sample,
            ids: self.ids.split_off(requests[self.request].prompt.len()),
            logp: std::mem::take(&mut self.logp),
            sampling_logp: std::mem::take(&mut self.sampling_logp),
            finish,
        }
    }
}
