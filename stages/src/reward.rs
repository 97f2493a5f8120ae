//! Reward modelling: the model learns to score responses as people do.
//!
//! The model has a scalar head; the score of a response is what the head says at its last token. Learnt is the pairwise
//! logistic loss of [`loss`], over pairs of which people preferred one.

pub mod loss;

use std::path::Path;

use candle_core::{Device, Tensor};
use tandem_engine::model::families::RewardScale;
use tandem_engine::model::unit::Head;
use tandem_engine::{Engine, MicroBatch, Model, Packed, Train};

use crate::adapters;
use crate::cli::{Launch, Outcome};
use crate::config::{Config, Role, Stage};
use crate::dataset::{Pair, RewardPairs, Text, reward_pairs, stage_rows};
use crate::dry_run;
use crate::error::Result;
use crate::models::{self, LoadedModel};
use crate::monitor::field;
use crate::ranks::Team;
use crate::run::Run;
use crate::supervised::{self, Measures, Objective, Pass, Plan, StepRow, batches};
use loss::PairLoss;

/// Runs the stage in `dir`; `pipeline` is the pipeline's directory, if it is run as part of one.
///
/// # Errors
/// Data or a model that cannot be used, a directory that holds another run, numbers that went wrong, a disk that fails.
pub fn run(launch: &Launch, dir: &Path, pipeline: Option<&Path>) -> Result<Outcome> {
    let config = &launch.config;
    let source = config.reward_init(pipeline)?;
    if launch.dry_run
        && let Some(outcome) = dry_run::from_shape(launch, Stage::Reward)?
    {
        return Ok(outcome);
    }
    if launch.dry_run && pipeline.is_some() && !Path::new(&source).exists() {
        let rows = stage_rows(config, Stage::Reward)?;
        let (train, eval) = (rows.train.len(), rows.eval.len());
        launch.say(format_args!("reward: {train} rows, {eval} held out; starts from what sft will make"));
        return Ok(Outcome::Finished);
    }
    let start = models::load_for(config, &source, Head::Scalar)?.init_score(config.run.seed);
    start.check_length("data.max_tokens", config.data.max_tokens)?;
    let pairs = reward_pairs(config, &start.tokenizer)?;
    let training = config.reward.training();
    if launch.dry_run {
        let (train, eval, steps) = (pairs.train.len(), pairs.eval.len(), training.steps(pairs.train.len()));
        let work = format!("{train} pairs, {eval} held out, {steps} steps");
        return dry_run::print(launch, Stage::Reward, start.blueprint.spec(), &work);
    }
    let mut run = Run::open(dir, Stage::Reward, config, launch.resume, &launch.world)?;
    run.pin("data", &pairs.digest)?;
    run.pin("model", &start.digest()?)?;
    if run.is_finished() {
        tracing::info!("reward: finished before; nothing is left to do");
        return Ok(Outcome::Finished);
    }
    let LoadedModel { blueprint, tokenizer, source_config, .. } = start;
    let (seed, role) = (config.run.seed, Role::RewardModel);
    let plan = Plan { stage: Stage::Reward, training, optimizer: &config.reward.optimizer, seed, role };
    let team = Team::new(launch, &run, Stage::Reward)?;
    let objective = Preferences::new(&pairs, config);
    let Some(trained) = supervised::train(launch, &mut run, &team, &plan, &blueprint, &objective)? else {
        return Ok(Outcome::Stopped);
    };
    let scale = objective.scale(&trained.model, &team)?;
    adapters::publish(&trained.model, &config.lora, &source, &mut run)?;
    let results = supervised::results(&trained, run.seconds());
    let export = run.finish(&results, |staging| {
        models::export(&trained.model, &tokenizer, &source_config, scale, config, staging)
    })?;
    let shown = [
        (field::EVAL_ACCURACY, "accuracy, held-out pairs"),
        (field::REWARD_MEAN, "mean score, held-out texts"),
        (field::REWARD_STD, "standard deviation"),
    ];
    launch.say(format_args!("{}\n{}", supervised::table("reward", &results, &shown), export.display()));
    Ok(Outcome::Finished)
}

/// Scoring the preferred response higher.
struct Preferences<'a> {
    pairs: &'a RewardPairs,
    loss: PairLoss,
    /// Most tokens of a forward pass.
    budget: usize,
    /// Most texts to measure the scale on where no pair is held out.
    max_texts: usize,
}

impl<'a> Preferences<'a> {
    fn new(pairs: &'a RewardPairs, config: &Config) -> Self {
        Self {
            pairs,
            loss: PairLoss { centring: config.reward.centring },
            budget: config.reward.tokens_per_micro_batch,
            max_texts: config.eval.max_rows,
        }
    }

    fn pair(&self, row: StepRow) -> Pair {
        self.pairs.train.pair(row.epoch, row.index)
    }

    /// The two texts of a pair, the preferred one first.
    fn texts(&self, row: StepRow) -> [&Text; 2] {
        let Pair { chosen, rejected, .. } = self.pair(row);
        [chosen, rejected].map(|text| &self.pairs.train.texts()[text])
    }

    /// The score of each text.
    fn scores(&self, model: &Model, team: &Team, texts: &[Text]) -> Result<Vec<f64>> {
        let lengths: Vec<usize> = texts.iter().map(|text| text.ids.len()).collect();
        let scored = team.score(model, &batches(&lengths, self.budget)?, |group| {
            let batch = Packed::from_sequences(group.iter().map(|&index| &texts[index].ids));
            Ok(model.scores(&batch, &last_rows(&batch))?.to_vec1()?)
        })?;
        Ok(scored.into_iter().flatten().map(f64::from).collect())
    }

    /// Mean and spread of the scores of held-out texts (of training texts if none is held out); `None` if all are the same.
    fn scale(&self, model: &Model, team: &Team) -> Result<Option<RewardScale>> {
        let held_out = self.pairs.eval.texts();
        let trained = self.pairs.train.texts();
        let texts = if held_out.is_empty() { &trained[..trained.len().min(self.max_texts)] } else { held_out };
        let (mean, std) = mean_and_std(&self.scores(model, team, texts)?);
        if std > 0.0 && mean.is_finite() && std.is_finite() {
            return Ok(Some(RewardScale { mean, std }));
        }
        tracing::warn!("reward: all texts score the same; no scale is stored");
        Ok(None)
    }
}

impl Objective for Preferences<'_> {
    fn rows(&self) -> usize {
        self.pairs.train.len()
    }

    fn tokens(&self, row: StepRow) -> usize {
        self.texts(row).iter().map(|text| text.ids.len()).sum()
    }

    fn terms(&self, _row: StepRow) -> usize {
        1
    }

    fn origin(&self, row: StepRow) -> String {
        let [chosen, rejected] = self.texts(row);
        format!("{} over {}", chosen.origin, rejected.origin)
    }

    fn accumulate(
        &self,
        engine: &mut Engine<Train>,
        passes: &[Option<Vec<StepRow>>],
        pass: Pass,
    ) -> Result<Vec<Option<f64>>> {
        let micro_batch = |rows: &Vec<StepRow>| {
            let mut batch = Packed::new();
            for &row in rows {
                for (text, side) in self.texts(row).into_iter().zip(0..) {
                    batch.push(&text.ids, 2 * row.place + side);
                }
            }
            MicroBatch { rows: last_rows(&batch), labels: Vec::new(), batch, dropout: pass.dropout }
        };
        let micro_batches: Vec<_> = passes.iter().map(|rows| rows.as_ref().map(micro_batch)).collect();
        let mut sums = vec![None; passes.len()];
        engine.accumulate_all_scores(&micro_batches, pass.recompute, |number, scores| {
            let rows = passes[number].iter().flatten();
            let margins: Vec<f32> = rows.map(|&row| self.pair(row).margin).collect();
            let (loss, slopes) = self.loss.of(&scores.to_vec1::<f32>()?, &margins);
            sums[number] = Some(loss);
            // A linear function with the loss's own slopes: autograd has another idea of |x| at equal scores.
            let slopes = Tensor::from_vec(slopes, scores.dims1()?, &Device::Cpu)?;
            Ok((scores * slopes)?.sum_all()?)
        })?;
        Ok(sums)
    }

    /// Share of held-out pairs that are ranked as people rank them, and mean and spread of the held-out texts' scores.
    fn evaluate(&self, model: &Model, team: &Team) -> Result<Measures> {
        let held_out = &self.pairs.eval;
        if held_out.is_empty() {
            return Ok(Measures::new());
        }
        let scores = self.scores(model, team, held_out.texts())?;
        let pairs = (0..held_out.len()).map(|index| held_out.pair(0, index));
        let right = pairs.filter(|pair| scores[pair.chosen] > scores[pair.rejected]).count();
        let (mean, std) = mean_and_std(&scores);
        Ok(vec![
            (field::EVAL_ACCURACY, right as f64 / held_out.len() as f64),
            (field::REWARD_MEAN, mean),
            (field::REWARD_STD, std),
        ])
    }
}

/// The last token's row of each sequence: where a response ends, and where its score stands.
fn last_rows(batch: &Packed) -> Vec<u32> {
    batch.cu_seqlens[1..].iter().map(|end| end - 1).collect()
}

/// Mean and standard deviation (of the population).
fn mean_and_std(values: &[f64]) -> (f64, f64) {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / count;
    (mean, variance.sqrt())
}

#[cfg(test)]
mod tests;
