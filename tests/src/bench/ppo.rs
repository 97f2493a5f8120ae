//! A PPO iteration with four models of one shape, out of the parts that the `ppo` command is made of.

use std::time::Instant;

use tandem_engine::generate::{Finish, SamplingKey};
use tandem_engine::model::unit::Head;
use tandem_engine::parallel::Placement;
use tandem_engine::{Engine, Model, Packed};
use tandem_kernels::sample::SamplingParams;
use tandem_stages::ppo::advantage::{RewardShape, gae};
use tandem_stages::ppo::rollout::{RolloutConfig, Sequence, log_probs, sample, values};
use tandem_stages::ppo::update::{Learners, Lesson, UpdateConfig, update};
use tandem_stages::ranks::Team;

use super::case::Case;
use super::generate::{NEW_TOKENS, PROMPT_TOKENS, SEQUENCES, frozen, prompts};
use super::train::{optimizer, recompute};
use super::{BenchError, Measured, median, peak_mib, warmed_up};

const PHASES: [&str; 3] = ["generate", "score", "train"];

pub(super) fn run(case: &Case) -> Result<Measured, BenchError> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(case.threads()).build()?;
    let laps = pool.install(|| iterations(case))?;
    let phase = |index: usize| median(&laps.iter().map(|lap| lap[index]).collect::<Vec<_>>());
    Ok(Measured {
        seconds: laps.iter().map(|lap| lap.iter().sum()).collect(),
        tokens: SEQUENCES * (PROMPT_TOKENS.1 + NEW_TOKENS),
        peak_mib: peak_mib(),
        phases: PHASES.iter().enumerate().map(|(index, name)| (name.to_string(), phase(index))).collect(),
    })
}

/// Seconds of each phase of each iteration.
fn iterations(case: &Case) -> Result<Vec<[f64; 3]>, BenchError> {
    let (spec, team) = (case.shape.spec(), Team::solo());
    let engine = |head, seed| {
        let model = Model::initial(spec.clone(), head, seed)?.with_precision(case.precision.precision())?;
        Engine::placed(model, optimizer(), case.placed(Placement::solo()))
    };
    let (mut actor, mut critic) = (engine(Head::Language, 1234)?, engine(Head::Scalar, 1235)?);
    let (reference, reward) = (frozen(case, Head::Language, 1234)?, frozen(case, Head::Scalar, 1236)?);
    let rollout = RolloutConfig {
        sampling: SamplingParams::default(),
        max_response_tokens: NEW_TOKENS,
        stop: Vec::new(),
        slots: SEQUENCES,
        prefill_tokens: case.tokens_per_micro_batch,
    };
    let config = UpdateConfig {
        policy_clip: 0.2,
        value_clip: 0.2,
        entropy_coefficient: 0.0,
        whiten: false,
        tokens_per_micro_batch: case.tokens_per_micro_batch,
        recompute: recompute(case),
    };
    let shape = RewardShape { kl_coefficient: 0.1, score_clip: Some(5.0), missing_eos_penalty: 0.0 };
    let mut laps = Vec::new();
    for iteration in 0..case.warmup + case.steps {
        if iteration == case.warmup {
            warmed_up();
        }
        let start = Instant::now();
        let prompts = prompts(case.shape, iteration as u64);
        let borrowed: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        let key = SamplingKey { seed: 1, step: iteration as u64 };
        let answers;
        (actor, answers, _) = sample(actor, &borrowed, 1, 0, key, &rollout)?;
        let generated = Instant::now();

        let sequences: Vec<Sequence<'_>> = answers
            .iter()
            .map(|answer| Sequence { sample: answer.sample, prompt: &prompts[answer.request], response: &answer.ids })
            .collect();
        let reference_logp = log_probs(&team, &reference, &sequences, case.tokens_per_micro_batch)?;
        let old_values = values(&team, critic.model(), &sequences, case.tokens_per_micro_batch)?;
        let scores = scores(&reward, &sequences, case.tokens_per_micro_batch)?;
        let scored = Instant::now();

        let mut lessons = Vec::with_capacity(answers.len());
        for (index, answer) in answers.iter().enumerate() {
            let ended = answer.finish == Finish::Stop;
            let rewards = shape.token_rewards(&answer.logp, &reference_logp[index], scores[index], ended);
            let (advantages, returns) = gae(&rewards, &old_values[index], 1.0, 0.95);
            lessons.push(Lesson {
                sample: answer.sample,
                prompt: prompts[answer.request].clone(),
                response: answer.ids.clone(),
                old_logp: answer.logp.clone(),
                old_values: old_values[index].clone(),
                advantages,
                returns,
            });
        }
        let lessons: Vec<&Lesson> = lessons.iter().collect();
        let outcome = update(&team, &mut actor, &mut critic, &lessons, Learners::Both, &config)?;
        if !(outcome.actor_is_finite && outcome.critic_is_finite) {
            return Err("a gradient is not finite".into());
        }
        let trained = Instant::now();
        if iteration >= case.warmup {
            laps.push([generated - start, scored - generated, trained - scored].map(|lap| lap.as_secs_f64()));
        }
    }
    Ok(laps)
}

/// The score of each sequence, at its last token.
fn scores(model: &Model, sequences: &[Sequence<'_>], budget: usize) -> Result<Vec<f32>, BenchError> {
    let mut scores = Vec::with_capacity(sequences.len());
    let per_batch = (budget / (PROMPT_TOKENS.1 + NEW_TOKENS)).max(1);
    for part in sequences.chunks(per_batch) {
        let batch = Packed::from_sequences(part.iter().map(|sequence| [sequence.prompt, sequence.response].concat()));
        let last: Vec<u32> = batch.cu_seqlens[1..].iter().map(|end| end - 1).collect();
        scores.extend(model.scores(&batch, &last)?.to_vec1::<f32>()?);
    }
    Ok(scores)
}
