//! An iteration's experience: sampled, measured, committed, and read back.
//!
//! Updates learn from what was read back, so that a run that was interrupted learns from the same facts.

use std::time::Instant;

use tandem_data::experience::{ExperienceRow, Finish, read_parquet, to_parquet};
use tandem_data::order::{Cursor, Sampler};
use tandem_engine::generate::{self, SamplingKey};
use tandem_engine::{Engine, Model, Train};

use super::advantage::{RewardShape, gae};
use super::rollout::{self, RolloutConfig, Sequence};
use super::update::Lesson;
use crate::dataset::PromptRow;
use crate::error::{Result, StageError};
use crate::ranks::Team;
use crate::run::Run;
use crate::scoring::{ScoreItem, Scorer};

/// The file of the rows that a group of ranks has sampled.
fn file_name(group: usize) -> String {
    format!("rank-{group:05}.parquet")
}

/// Seconds that the parts of an iteration took.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Times {
    pub(super) generate_s: f64,
    pub(super) score_s: f64,
}

/// Makes experience.
pub(super) struct Explorer<'a> {
    pub(super) team: &'a Team,
    pub(super) prompts: &'a [PromptRow],
    pub(super) reference: &'a Model,
    pub(super) tokenizer: &'a tandem_data::Tokenizer,
    pub(super) rollout: RolloutConfig,
    pub(super) prompts_per_iteration: usize,
    pub(super) samples_per_prompt: usize,
    pub(super) tokens_per_micro_batch: usize,
    pub(super) seed: u64,
}

impl Explorer<'_> {
    /// The prompts of `iteration`: a fresh order each pass over the data, and a function of the iteration alone.
    fn prompts_of(&self, iteration: u64) -> Result<Vec<&PromptRow>> {
        let (before, len) = (iteration * self.prompts_per_iteration as u64, self.prompts.len() as u64);
        let cursor = Cursor { epoch: before / len.max(1), position: before % len.max(1) };
        let mut order = Sampler::new(self.prompts.len(), self.seed)?.resume(cursor)?;
        Ok(order.next_batch(self.prompts_per_iteration).into_iter().map(|index| &self.prompts[index]).collect())
    }

    /// Samples responses for `iteration` and measures them.
    pub(super) fn explore(
        &self,
        actor: Engine<Train>,
        critic: &Model,
        scorer: &mut dyn Scorer,
        iteration: u64,
    ) -> Result<(Engine<Train>, Vec<ExperienceRow>, Times)> {
        let start = Instant::now();
        let prompts = self.prompts_of(iteration)?;
        let ids: Vec<&[u32]> = prompts.iter().map(|prompt| prompt.ids.as_slice()).collect();
        let samples = self.samples_per_prompt as u64;
        let first_sample = iteration * ids.len() as u64 * samples;
        let key = SamplingKey { seed: self.seed, step: iteration };
        let policy_step = actor.optimizer().step();
        let (actor, completions, _) =
            rollout::sample(actor, &ids, self.samples_per_prompt, first_sample, key, &self.rollout)?;
        let generate_s = start.elapsed().as_secs_f64();

        let start = Instant::now();
        let sequences: Vec<Sequence<'_>> = completions
            .iter()
            .map(|c| Sequence { sample: c.sample, prompt: ids[c.request], response: &c.ids })
            .collect();
        let ref_logp = rollout::log_probs(self.team, self.reference, &sequences, self.tokens_per_micro_batch)?;
        let values = rollout::values(self.team, critic, &sequences, self.tokens_per_micro_batch)?;
        let texts: Vec<String> =
            completions.iter().map(|c| Ok(self.tokenizer.decode(&c.ids)?)).collect::<Result<_>>()?;
        let items: Vec<ScoreItem<'_>> = completions
            .iter()
            .zip(&texts)
            .map(|(c, text)| ScoreItem {
                prompt_ids: ids[c.request],
                response_ids: &c.ids,
                prompt_text: &prompts[c.request].text,
                response_text: text,
            })
            .collect();
        let scores = scorer.score(&items)?;
        drop((sequences, items));
        let measured = ref_logp.into_iter().zip(values).zip(scores).zip(texts);
        let rows = completions.into_iter().zip(measured).map(|(c, (((ref_logp, value), score), response_text))| {
            let prompt = prompts[c.request];
            ExperienceRow {
                sample: c.sample,
                iteration: iteration as u32,
                policy_step,
                prompt_ids: prompt.ids.clone(),
                response_ids: c.ids,
                logp: c.logp,
                ref_logp,
                value,
                score,
                finish: match c.finish {
                    generate::Finish::Stop => Finish::Eos,
                    generate::Finish::Length => Finish::Length,
                },
                prompt_text: prompt.text.clone(),
                response_text,
            }
        });
        let rows = rows.collect();
        Ok((actor, rows, Times { generate_s, score_s: start.elapsed().as_secs_f64() }))
    }
}

/// Publishes the rows of `iteration` in one piece: a file for each of the `groups` of ranks that have sampled them.
pub(super) fn commit(run: &Run, iteration: u64, rows: &[ExperienceRow], groups: usize) -> Result<()> {
    let meta = serde_json::json!({ "iteration": iteration, "rows": rows.len(), "files": groups });
    run.commit_experience(iteration, meta, |staging| {
        let Some(staging) = staging else { return Ok(()) };
        for group in 0..groups {
            let own = rows.len() * group / groups..rows.len() * (group + 1) / groups;
            staging.write(&file_name(group), &to_parquet(&rows[own])?)?;
        }
        Ok(())
    })
}

/// Reads the rows of `iteration`, if they are there, and checks that the policy of `policy_step` sampled them.
pub(super) fn read(run: &Run, iteration: u64, policy_step: Option<u64>) -> Result<Option<Vec<ExperienceRow>>> {
    let Some(published) = run.open_experience(iteration)? else { return Ok(None) };
    let mut rows = Vec::new();
    for file in published.files().iter().filter(|file| file.name.ends_with(".parquet")) {
        rows.extend(read_parquet(published.path(&file.name)?)?);
    }
    match (policy_step, rows.first()) {
        (Some(step), Some(row)) if row.policy_step != step => Err(StageError::Numerical(format!(
            "{} was sampled by the policy of step {}, this one is of step {step}; remove that folder to sample again",
            published.dir().display(),
            row.policy_step
        ))),
        _ => Ok(Some(rows)),
    }
}

/// What the rows teach at a KL coefficient: advantages and returns are derived here, each time anew.
pub(super) fn lessons(rows: Vec<ExperienceRow>, shape: &RewardShape, gamma: f64, lambda: f64) -> Vec<Lesson> {
    let lesson = |row: ExperienceRow| {
        let rewards = shape.token_rewards(&row.logp, &row.ref_logp, row.score, row.finish != Finish::Length);
        let (advantages, returns) = gae(&rewards, &row.value, gamma, lambda);
        Lesson {
            sample: row.sample,
            prompt: row.prompt_ids,
            response: row.response_ids,
            old_logp: row.logp,
            old_values: row.value,
            advantages,
            returns,
        }
    };
    rows.into_iter().map(lesson).collect()
}

/// Figures of a rollout.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Figures {
    pub(super) score_mean: f64,
    pub(super) score_std: f64,
    /// Mean over responses of `Σ_t log π − log π_ref`, nats.
    pub(super) kl_mean: f64,
    pub(super) len_mean: f64,
    pub(super) eos_rate: f64,
}

/// Figures of the rows of an iteration.
pub(super) fn figures(rows: &[ExperienceRow]) -> Figures {
    let count = rows.len().max(1) as f64;
    let mean = |of: &dyn Fn(&ExperienceRow) -> f64| rows.iter().map(of).sum::<f64>() / count;
    let kl = |row: &ExperienceRow| -> f64 {
        row.logp.iter().zip(&row.ref_logp).map(|(&p, &r)| f64::from(p) - f64::from(r)).sum()
    };
    let score_mean = mean(&|row| f64::from(row.score));
    Figures {
        score_mean,
        score_std: mean(&|row| (f64::from(row.score) - score_mean).powi(2)).sqrt(),
        kl_mean: mean(&kl),
        len_mean: mean(&|row| row.response_ids.len() as f64),
        eos_rate: mean(&|row| f64::from(u8::from(row.finish != Finish::Length))),
    }
}
