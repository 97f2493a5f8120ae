//! Sampling in a batch.

use tandem_engine::Model;
use tandem_engine::generate::{Request, SamplingKey, generate};
use tandem_engine::model::Blueprint;
use tandem_engine::model::unit::Head;
use tandem_engine::parallel::Placement;
use tandem_kernels::sample::SamplingParams;

use super::case::Case;
use super::{BenchError, Measured, Shape, lengths, peak_mib, timed, tokens};

/// Prompts.
pub(super) const SEQUENCES: usize = 16;
/// Tokens of a prompt, from and to.
pub(super) const PROMPT_TOKENS: (usize, usize) = (64, 128);
/// Tokens sampled after each.
pub(super) const NEW_TOKENS: usize = 128;

/// The prompts of iteration `iteration`.
pub(super) fn prompts(shape: Shape, iteration: u64) -> Vec<Vec<u32>> {
    let vocabulary = shape.spec().vocab_size;
    let lengths = lengths(1000 + iteration, SEQUENCES, PROMPT_TOKENS.0, PROMPT_TOKENS.1);
    let prompt = |(index, length)| tokens(2000 + 100 * iteration + index as u64, length, vocabulary);
    lengths.into_iter().enumerate().map(prompt).collect()
}

/// A model that is not trained, as stages load it: unit by unit, in the format that it is kept in.
pub(super) fn frozen(case: &Case, head: Head, seed: u64) -> Result<Model, BenchError> {
    let placement = Placement { is_frozen: true, weights: case.weights(), ..case.placed(Placement::solo()) };
    Ok(Blueprint::initial(case.shape.spec(), head, seed).place(&placement)?)
}

pub(super) fn run(case: &Case) -> Result<Measured, BenchError> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(case.threads()).build()?;
    let seconds = pool.install(|| {
        let model = frozen(case, Head::Language, 1234)?;
        let requests: Vec<Request> = prompts(case.shape, 0)
            .into_iter()
            .enumerate()
            .map(|(index, prompt)| Request {
                prompt,
                samples: vec![index as u64],
                max_new_tokens: NEW_TOKENS,
                stop: Vec::new(),
                sampling: SamplingParams::default(),
            })
            .collect();
        timed(case.warmup, case.steps, |step| {
            let key = SamplingKey { seed: 1, step: step as u64 };
            let answers = generate(&model, &requests, SEQUENCES, 4096, key, &mut |_, _, _| {})?;
            let tokens: usize = answers.iter().map(|answer| answer.ids.len()).sum();
            if tokens == SEQUENCES * NEW_TOKENS { Ok(()) } else { Err(format!("{tokens} tokens").into()) }
        })
    })?;
    Ok(Measured { seconds, tokens: SEQUENCES * NEW_TOKENS, peak_mib: peak_mib(), phases: Vec::new() })
}
