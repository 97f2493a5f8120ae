//! An iteration's experience: sampled, measured, committed, and read back.
//!
//! Updates learn from what was read back, so that a run that was interrupted learns from the same facts.

use std::time::Instant;

use serde::{Deserialize, Serialize};
use tandem_data::experience::{ExperienceRow, Finish, read_parquet, to_parquet};
use tandem_data::order::{Cursor, Sampler};
use tandem_engine::generate::{self, SamplingKey};
use tandem_engine::{Engine, Model, Train, WeightFormat};

use super::advantage::{RewardShape, gae};
use super::rollout::{self, RolloutConfig, Sequence};
use super::state::bits;
use super::update::Lesson;
use crate::dataset::PromptRow;
use crate::error::{Result, StageError};
use crate::ranks::Team;
use crate::run::Run;
use crate::scoring::{ScoreItem, Scorer};

/// What the manifest of a rollout calls its [`Gap`].
const GAP: &str = "logp_gap";

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
    pub(super) rollout_weights: WeightFormat,
    pub(super) seed: u64,
}

/// What an iteration learns from.
#[derive(Debug)]
pub(super) struct Rollout {
    pub(super) rows: Vec<ExperienceRow>,
    /// How far the log-probabilities recorded while sampling were from those in the rows, where these were computed again.
    pub(super) gap: Option<Gap>,
}

/// Differences between log-probabilities recorded while sampling and those of the model as it is trained, in nats.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Gap {
    /// Mean over tokens.
    #[serde(with = "bits")]
    pub(super) mean: f64,
    #[serde(with = "bits")]
    pub(super) max: f64,
}

impl Gap {
    fn between<'a>(recorded: impl Iterator<Item = &'a Vec<f32>>, computed: &[Vec<f32>]) -> Self {
        let (mut gap, mut tokens) = (Self::default(), 0.0);
        for (recorded, computed) in recorded.flatten().zip(computed.iter().flatten()) {
            let difference = (f64::from(*recorded) - f64::from(*computed)).abs();
            gap.mean += difference;
            gap.max = gap.max.max(difference);
            tokens += 1.0;
        }
        Self { mean: gap.mean / f64::max(tokens, 1.0), ..gap }
    }
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
    ) -> Result<(Engine<Train>, Rollout, Times)> {
        let start = Instant::now();
        let prompts = self.prompts_of(iteration)?;
        let ids: Vec<&[u32]> = prompts.iter().map(|prompt| prompt.ids.as_slice()).collect();
        let samples = self.samples_per_prompt as u64;
        let first_sample = iteration * ids.len() as u64 * samples;
        let key = SamplingKey { seed: self.seed, step: iteration };
        let policy_step = actor.optimizer().step();
        let (actor, mut completions, _) =
            rollout::sample(actor, &ids, self.samples_per_prompt, first_sample, key, &self.rollout)?;
        let generate_s = start.elapsed().as_secs_f64();

        let start = Instant::now();
        let sequences: Vec<Sequence<'_>> = completions
            .iter()
            .map(|c| Sequence { sample: c.sample, prompt: ids[c.request], response: &c.ids })
            .collect();
        // What another format than the actor's has recorded is not what the actor would say.
        let own_logp = match self.rollout_weights {
            WeightFormat::Precision => None,
            WeightFormat::Int8 => {
                Some(rollout::log_probs(self.team, actor.model(), &sequences, self.tokens_per_micro_batch)?)
            }
        };
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
        let gap = own_logp.map(|computed| {
            let gap = Gap::between(completions.iter().map(|c| &c.logp), &computed);
            for (completion, computed) in completions.iter_mut().zip(computed) {
                completion.logp = computed;
            }
            gap
        });
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
        Ok((actor, Rollout { rows, gap }, Times { generate_s, score_s: start.elapsed().as_secs_f64() }))
    }
}

/// Publishes the rollout of `iteration` in one piece: a file for each of the `groups` of ranks that have sampled its rows.
pub(super) fn commit(run: &Run, iteration: u64, rollout: &Rollout, groups: usize) -> Result<()> {
    let Rollout { rows, gap } = rollout;
    let meta = serde_json::json!({ "iteration": iteration, "rows": rows.len(), "files": groups, GAP: gap });
    run.commit_experience(iteration, meta, |staging| {
        let Some(staging) = staging else { return Ok(()) };
        for group in 0..groups {
            let own = rows.len() * group / groups..rows.len() * (group + 1) / groups;
            staging.write(&file_name(group), &to_parquet(&rows[own])?)?;
        }
        Ok(())
    })
}

/// Reads the rollout of `iteration`, if it is there, and checks that the policy of `policy_step` sampled it.
pub(super) fn read(run: &Run, iteration: u64, policy_step: Option<u64>) -> Result<Option<Rollout>> {
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
        _ => {
            let gap = published.meta().get(GAP).cloned().unwrap_or_default();
            let gap = serde_json::from_value(gap).map_err(|error| {
                StageError::Numerical(format!("{}: {GAP}: {error}; remove that folder", published.dir().display()))
            })?;
            Ok(Some(Rollout { rows, gap }))
        }
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
