//! Sampling responses with the actor, and measuring them with reference and critic.

mod deal;

use tandem_data::packing::{Packing, pack_by_tokens};
use tandem_engine::generate::{CacheSize, Completion, Request, SamplingKey};
use tandem_engine::{Engine, Model, Packed, SwitchReport, Train};
use tandem_kernels::sample::SamplingParams;

use crate::error::Result;
use crate::ranks::Team;

pub(in crate::ppo) use deal::{dealt, groups};

/// How responses are sampled.
#[derive(Clone, Debug, PartialEq)]
pub struct RolloutConfig {
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Longest response, tokens.
    pub max_response_tokens: usize,
    /// Tokens that end a response.
    pub stop: Vec<u32>,
    /// Sequences decoded at once.
    pub slots: usize,
    /// Tokens of prompts read at once.
    pub prefill_tokens: usize,
}

/// Answers each of `prompts` with `samples_per_prompt` samples, named `first_sample` onwards in order.
///
/// Groups of ranks answer shares of them, and every rank gets all answers. The engine switches to generation and back; its type makes training in between impossible.
///
/// # Errors
/// If a prompt and its response do not fit the model.
pub fn sample(
    actor: Engine<Train>,
    prompts: &[&[u32]],
    samples_per_prompt: usize,
    first_sample: u64,
    key: SamplingKey,
    config: &RolloutConfig,
) -> Result<(Engine<Train>, Vec<Completion>, [SwitchReport; 2])> {
    let requests: Vec<Request> = prompts
        .iter()
        .zip((first_sample..).step_by(samples_per_prompt))
        .map(|(prompt, first)| Request {
            prompt: prompt.to_vec(),
            samples: (first..first + samples_per_prompt as u64).collect(),
            max_new_tokens: config.max_response_tokens,
            stop: config.stop.clone(),
            sampling: config.sampling,
        })
        .collect();
    let parallel = actor.model().parallel().clone();
    let longest = prompts.iter().map(|prompt| prompt.len()).max().unwrap_or(0) + config.max_response_tokens;
    let most = (prompts.len() * samples_per_prompt).div_ceil(deal::groups(&parallel));
    let slots = config.slots.clamp(1, most.max(1));
    let (mut engine, to_generate) = actor.into_generate(CacheSize { slots, max_len: longest })?;
    let completions = deal::dealt(&parallel, &requests, |requests| {
        Ok(engine.generate(requests, key, config.prefill_tokens, &mut |_, _, _| {})?)
    })?;
    let (engine, to_train) = engine.into_train()?;
    Ok((engine, completions, [to_generate, to_train]))
}

/// A prompt and a response, to be measured or learnt.
#[derive(Clone, Copy, Debug)]
pub struct Sequence<'a> {
    /// Name of the sample in the address of its random numbers.
    pub sample: u64,
    /// The prompt.
    pub prompt: &'a [u32],
    /// The response.
    pub response: &'a [u32],
}

/// Sequences packed into one batch, and the rows that predict their response tokens.
pub struct ResponseBatch {
    /// The batch.
    pub batch: Packed,
    /// Row before each response token, `[N]`.
    pub rows: Vec<u32>,
    /// The response tokens, `[N]`.
    pub labels: Vec<u32>,
}

impl ResponseBatch {
    /// Packs `sequences` end to end.
    pub fn new<'a>(sequences: impl IntoIterator<Item = Sequence<'a>>) -> Self {
        let mut all = Self { batch: Packed::new(), rows: Vec::new(), labels: Vec::new() };
        for sequence in sequences {
            let start = all.batch.tokens();
            all.batch.push(&[sequence.prompt, sequence.response].concat(), sequence.sample);
            let first = start + sequence.prompt.len() - 1;
            all.rows.extend((first..first + sequence.response.len()).map(|row| row as u32));
            all.labels.extend_from_slice(sequence.response);
        }
        all
    }
}

/// Log-probability of each response token under `model`.
///
/// # Errors
/// If a sequence does not fit the model.
pub fn log_probs(
    team: &Team,
    model: &Model,
    sequences: &[Sequence<'_>],
    tokens_per_micro_batch: usize,
) -> Result<Vec<Vec<f32>>> {
    measure(team, model, sequences, tokens_per_micro_batch, |batch| {
        Ok(model.log_probs(&batch.batch, &batch.rows, &batch.labels)?.logp.to_vec1()?)
    })
}

/// Value of `critic` before each response token.
///
/// # Errors
/// If a sequence does not fit the model.
pub fn values(
    team: &Team,
    critic: &Model,
    sequences: &[Sequence<'_>],
    tokens_per_micro_batch: usize,
) -> Result<Vec<Vec<f32>>> {
    measure(team, critic, sequences, tokens_per_micro_batch, |batch| {
        Ok(critic.scores(&batch.batch, &batch.rows)?.to_vec1()?)
    })
}

/// One number per response token of each sequence, computed in micro-batches.
fn measure(
    team: &Team,
    model: &Model,
    sequences: &[Sequence<'_>],
    tokens_per_micro_batch: usize,
    compute: impl Fn(&ResponseBatch) -> Result<Vec<f32>>,
) -> Result<Vec<Vec<f32>>> {
    let mut measured = vec![Vec::new(); sequences.len()];
    let batches = micro_batches(sequences, tokens_per_micro_batch)?;
    let scored = team.score(model, &batches, |members| {
        compute(&ResponseBatch::new(members.iter().map(|&index| sequences[index])))
    })?;
    for (members, all) in batches.into_iter().zip(scored) {
        let mut rest = all.as_slice();
        for index in members {
            let (own, others) = rest.split_at(sequences[index].response.len());
            measured[index] = own.to_vec();
            rest = others;
        }
    }
    Ok(measured)
}

/// Which sequences go through the model together.
pub(super) fn micro_batches(sequences: &[Sequence<'_>], tokens_per_micro_batch: usize) -> Result<Vec<Vec<usize>>> {
    let lengths: Vec<usize> = sequences.iter().map(|s| s.prompt.len() + s.response.len()).collect();
    let longest = lengths.iter().copied().max().unwrap_or(1);
    Ok(pack_by_tokens(&lengths, tokens_per_micro_batch, longest, Packing::InOrder)?)
}
