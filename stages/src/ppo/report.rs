//! The proof of the pudding: the model before and after PPO answers the same held-out prompts with the same random numbers, and
//! both are measured by the reward, by its distance from the start, and by a judge that PPO never saw.

use std::collections::HashSet;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tandem_data::Tokenizer;
use tandem_engine::Model;
use tandem_engine::generate::{Completion, Finish, Request, SamplingKey, generate};

use super::rollout::{Sequence, dealt, log_probs};
use crate::config::Config;
use crate::dataset::PromptRow;
use crate::error::{Result, StageError};
use crate::monitor::{Table, printable};
use crate::ranks::Team;
use crate::scoring::{RuleScorer, ScoreItem, Scorer};

/// Address of the evaluation's random numbers: the last step there is, which no rollout reaches.
const EVALUATION_STEP: u64 = (1 << 56) - 1;
/// Sequences decoded at once.
const SLOTS: usize = 64;

/// A model's answer to a held-out prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// The prompt.
    pub prompt: String,
    /// The response, without special tokens.
    pub text: String,
    /// Its tokens, the end token included.
    pub ids: Vec<u32>,
    /// Log-probability of each token under the model that wrote it.
    pub logp: Vec<f32>,
    /// Why it ended.
    pub finish: Finish,
}

/// What is measured of the answers of one model.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Measures {
    /// Mean score.
    #[serde(rename = "reward/mean")]
    pub reward_mean: f64,
    /// Standard deviation of the scores.
    #[serde(rename = "reward/std")]
    pub reward_std: f64,
    /// Share of the answers that the judge finds positive; `None` without a judge.
    #[serde(rename = "judge/positive")]
    pub positive: Option<f64>,
    /// Share of distinct pairs of neighbouring words among all such pairs (Li et al., 2016): how varied the answers are.
    pub distinct2: f64,
    /// Mean length in tokens.
    #[serde(rename = "response/len_mean")]
    pub length_mean: f64,
    /// Share of the answers that ended by themselves.
    #[serde(rename = "response/eos_rate")]
    pub eos_rate: f64,
}

/// Two answers to one prompt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SamplePair {
    /// The prompt.
    pub prompt: String,
    /// The answer before PPO.
    pub before: String,
    /// Its score.
    pub reward_before: f32,
    /// The answer after PPO.
    pub after: String,
    /// Its score.
    pub reward_after: f32,
}

/// The model before and after PPO.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// Held-out prompts answered.
    pub prompts: usize,
    /// Before: the reference.
    pub before: Measures,
    /// After.
    pub after: Measures,
    /// Rise of the mean score in standard deviations of the scores before; `None` if those were all the same.
    pub gain_sd: Option<f64>,
    /// Mean over the answers after PPO of `Σ (log π − log π_ref)`, in nats.
    pub kl_mean: f64,
    /// The first few prompts with both answers.
    pub samples: Vec<SamplePair>,
}

/// Lets `model` answer `prompts` as in a rollout, with random numbers that depend on `config.run.seed` and the prompt's place
/// only.
///
/// # Errors
/// If a prompt with its response does not fit the model.
pub fn answer(
    team: &Team,
    model: &Model,
    prompts: &[PromptRow],
    config: &Config,
    tokenizer: &Tokenizer,
) -> Result<Vec<Answer>> {
    let requests: Vec<Request> = prompts
        .iter()
        .enumerate()
        .map(|(index, prompt)| Request {
            prompt: prompt.ids.clone(),
            samples: vec![index as u64],
            max_new_tokens: config.ppo.max_response_tokens,
            stop: tokenizer.stop_ids().to_vec(),
            sampling: config.ppo.sampling.params(),
        })
        .collect();
    let key = SamplingKey { seed: config.run.seed, step: EVALUATION_STEP };
    let laid_out = match model.generates_in_place() {
        true => model.clone(),
        false => model.inference_copy(None, config.ppo.tp_gather_partition_size, model.weight_format())?.0,
    };
    let completions = dealt(team.parallel(), &requests, |requests| {
        let budget = config.ppo.tokens_per_micro_batch;
        Ok(generate(&laid_out, requests, SLOTS, budget, key, &mut |_, _, _| {})?)
    })?;
    let answer = |(prompt, completion): (&PromptRow, Completion)| {
        let Completion { ids, logp, finish, .. } = completion;
        Ok(Answer { prompt: prompt.text.clone(), text: tokenizer.decode(&ids)?, ids, logp, finish })
    };
    prompts.iter().zip(completions).map(answer).collect()
}

/// Compares the model `before` PPO, the reference, with the one `after` it on the first `eval.prompts` of the held-out
/// `prompts`.
///
/// # Errors
/// If there is no prompt, or generating or scoring fails.
pub fn compare(
    team: &Team,
    before: &Model,
    after: &Model,
    prompts: &[PromptRow],
    scorer: &mut dyn Scorer,
    tokenizer: &Tokenizer,
    config: &Config,
) -> Result<Comparison> {
    let prompts = &prompts[..prompts.len().min(config.eval.prompts)];
    if prompts.is_empty() {
        return Err(StageError::Reward(
            "no held-out prompt is left for the evaluation; raise data.eval_fraction or add data".into(),
        ));
    }
    let mut judge = match config.eval.judge.as_slice() {
        [] => None,
        rules => Some(RuleScorer::new(rules)?),
    };
    let first = Examined::new(team, before, prompts, scorer, judge.as_mut(), tokenizer, config)?;
    let second = Examined::new(team, after, prompts, scorer, judge.as_mut(), tokenizer, config)?;
    let kl_mean = second.kl_mean(team, before, prompts, config)?;
    let gain = second.measures.reward_mean - first.measures.reward_mean;
    let samples =
        prompts.iter().zip(first.answers.iter().zip(&second.answers)).zip(first.scores.iter().zip(&second.scores));
    let samples =
        samples.take(config.eval.shown).map(|((prompt, (before, after)), (&reward_before, &reward_after))| {
            let (before, after) = (before.text.clone(), after.text.clone());
            SamplePair { prompt: prompt.text.clone(), before, reward_before, after, reward_after }
        });
    Ok(Comparison {
        prompts: prompts.len(),
        before: first.measures,
        after: second.measures,
        gain_sd: (first.measures.reward_std > 0.0).then(|| gain / first.measures.reward_std),
        kl_mean,
        samples: samples.collect(),
    })
}

/// One model's answers, their scores, and what follows from them.
struct Examined {
    answers: Vec<Answer>,
    scores: Vec<f32>,
    measures: Measures,
}

impl Examined {
    fn new(
        team: &Team,
        model: &Model,
        prompts: &[PromptRow],
        scorer: &mut dyn Scorer,
        judge: Option<&mut RuleScorer>,
        tokenizer: &Tokenizer,
        config: &Config,
    ) -> Result<Self> {
        let answers = answer(team, model, prompts, config, tokenizer)?;
        let items: Vec<ScoreItem<'_>> = prompts
            .iter()
            .zip(&answers)
            .map(|(prompt, answer)| ScoreItem {
                prompt_ids: &prompt.ids,
                response_ids: &answer.ids,
                prompt_text: &prompt.text,
                response_text: &answer.text,
            })
            .collect();
        let scores = scorer.score(&items)?;
        let verdicts = judge.map(|judge| judge.score(&items)).transpose()?;
        let measures = measure(&answers, &scores, verdicts.as_deref());
        Ok(Self { answers, scores, measures })
    }

    /// Mean divergence of the answers' model from `reference`, estimated on the answers themselves.
    fn kl_mean(&self, team: &Team, reference: &Model, prompts: &[PromptRow], config: &Config) -> Result<f64> {
        let sequences: Vec<Sequence<'_>> = prompts
            .iter()
            .zip(&self.answers)
            .zip(0..)
            .map(|((prompt, answer), sample)| Sequence { sample, prompt: &prompt.ids, response: &answer.ids })
            .collect();
        let reference = log_probs(team, reference, &sequences, config.ppo.tokens_per_micro_batch)?;
        let total = |logp: &[f32]| logp.iter().map(|&logp| f64::from(logp)).sum::<f64>();
        let divergences = self.answers.iter().zip(&reference).map(|(answer, of)| total(&answer.logp) - total(of));
        Ok(mean(divergences))
    }
}

fn measure(answers: &[Answer], scores: &[f32], verdicts: Option<&[f32]>) -> Measures {
    let reward_mean = mean(scores.iter().map(|&score| f64::from(score)));
    let variance = mean(scores.iter().map(|&score| (f64::from(score) - reward_mean).powi(2)));
    Measures {
        reward_mean,
        reward_std: variance.sqrt(),
        positive: verdicts.map(|verdicts| share(verdicts, |&verdict| verdict > 0.0)),
        distinct2: distinct2(answers.iter().map(|answer| answer.text.as_str())),
        length_mean: mean(answers.iter().map(|answer| answer.ids.len() as f64)),
        eos_rate: share(answers, |answer| answer.finish == Finish::Stop),
    }
}

/// Distinct pairs of neighbouring words over all such pairs, in all texts together; 0 if there is none.
fn distinct2<'a>(texts: impl Iterator<Item = &'a str>) -> f64 {
    let mut pairs = 0usize;
    let mut distinct = HashSet::new();
    for text in texts {
        let words: Vec<String> = text.split_whitespace().map(str::to_lowercase).collect();
        pairs += words.len().saturating_sub(1);
        distinct.extend(words.windows(2).map(|pair| (pair[0].clone(), pair[1].clone())));
    }
    distinct.len() as f64 / pairs.max(1) as f64
}

/// 0 of nothing.
fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len().max(1);
    values.sum::<f64>() / count as f64
}

fn share<T>(values: &[T], is_counted: impl Fn(&T) -> bool) -> f64 {
    mean(values.iter().map(|value| if is_counted(value) { 1.0 } else { 0.0 }))
}

const BEFORE: &str = "_before";
const AFTER: &str = "_after";

impl Comparison {
    /// All figures by name, for `run.json`: `reward/mean_before`, `reward/mean_after`, …
    pub fn results(&self) -> Map<String, Value> {
        let mut results = Map::new();
        for (suffix, measures) in [(BEFORE, json!(self.before)), (AFTER, json!(self.after))] {
            if let Value::Object(measures) = measures {
                results.extend(measures.into_iter().map(|(name, value)| (name + suffix, value)));
            }
        }
        results.insert("prompts".into(), json!(self.prompts));
        results.insert("reward/gain_sd".into(), json!(self.gain_sd));
        results.insert("kl/mean".into(), json!(self.kl_mean));
        results.insert("samples".into(), json!(self.samples));
        results
    }

    /// Reads [`Self::results`] back; `None` if something is missing.
    pub fn from_results(results: &Map<String, Value>) -> Option<Self> {
        let measures = |suffix: &str| {
            let named = results.iter().filter_map(|(name, value)| Some((name.strip_suffix(suffix)?, value)));
            let map: Map<String, Value> = named.map(|(name, value)| (name.to_owned(), value.clone())).collect();
            serde_json::from_value(Value::Object(map)).ok()
        };
        Some(Self {
            prompts: results.get("prompts")?.as_u64()? as usize,
            before: measures(BEFORE)?,
            after: measures(AFTER)?,
            gain_sd: results.get("reward/gain_sd")?.as_f64(),
            kl_mean: results.get("kl/mean")?.as_f64()?,
            samples: serde_json::from_value(results.get("samples")?.clone()).ok()?,
        })
    }

    /// The figures side by side.
    pub fn table(&self) -> Table {
        let (before, after) = (&self.before, &self.after);
        let number = |value: f64| format!("{value:.2}");
        let percent = |value: f64| format!("{:.1} %", value * 100.0);
        let mut table = Table::new([&format!("{} held-out prompts", self.prompts), "before", "after", "change"]);
        let gain = self.gain_sd.map_or_else(|| "-".to_owned(), |gain| format!("{gain:+.2} SD"));
        table.row(["mean reward", &number(before.reward_mean), &number(after.reward_mean), &gain]);
        table.row(["SD of rewards", &number(before.reward_std), &number(after.reward_std)]);
        if let (Some(first), Some(second)) = (before.positive, after.positive) {
            let points = format!("{:+.1} points", (second - first) * 100.0);
            table.row(["found positive by the judge", &percent(first), &percent(second), &points]);
        }
        table.row(["KL from the start, nats per response", "0.00", &number(self.kl_mean)]);
        let ratio = match before.distinct2 > 0.0 {
            true => format!("x {:.2}", after.distinct2 / before.distinct2),
            false => "-".to_owned(),
        };
        table.row(["distinct pairs of words", &percent(before.distinct2), &percent(after.distinct2), &ratio]);
        table.row(["mean length, tokens", &number(before.length_mean), &number(after.length_mean)]);
        table.row(["ended by themselves", &percent(before.eos_rate), &percent(after.eos_rate)]);
        table
    }
}

/// The table, and the first answers one below the other.
impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.table())?;
        for sample in &self.samples {
            writeln!(f, "\n{}", printable(&sample.prompt))?;
            writeln!(f, "  before {:+.2} | {}", sample.reward_before, printable(&sample.before))?;
            writeln!(f, "  after  {:+.2} | {}", sample.reward_after, printable(&sample.after))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
