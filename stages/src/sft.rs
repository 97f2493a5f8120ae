//! Supervised fine-tuning: the model learns to write the responses of the data.
//!
//! The loss is the negative log-probability of the response's tokens, the one that ends it among them:
//! `−Σ log π(response_t | prompt, response_<t)`, divided by the number of these tokens in the step.

mod unigram;

use std::path::Path;

use serde_json::json;
use tandem_data::{Encoded, Tokenizer};
use tandem_engine::model::families;
use tandem_engine::model::unit::Head;
use tandem_engine::{Engine, MicroBatch, Model, Packed, Train};

use crate::adapters;
use crate::cli::{Launch, Outcome};
use crate::config::{Config, Role, SftLoss, Stage};
use crate::dataset::{SftSample, SftSamples, sft_samples, train_tokenizer};
use crate::dry_run;
use crate::error::{Result, StageError};
use crate::models::{self, LoadedModel};
use crate::monitor::{Table, field};
use crate::plan::ModelSource;
use crate::ranks::Team;
use crate::run::Run;
use crate::supervised::{self, Measures, Objective, Pass, Plan, StepRow, Trained, batches};

/// The result that a perplexity has to be compared with: that of a model which knows only how frequent each token is.
pub const EVAL_UNIGRAM_PPL: &str = "eval/unigram_ppl";

/// Runs the stage in `dir`.
///
/// # Errors
/// Data or a model that cannot be used, a directory that holds another run, numbers that went wrong, a disk that fails.
pub fn run(launch: &Launch, dir: &Path, _pipeline: Option<&Path>) -> Result<Outcome> {
    let config = &launch.config;
    if launch.dry_run {
        return plan(launch);
    }
    let start = start(config)?;
    start.check_length("data.max_tokens", config.data.max_tokens)?;
    let samples = sft_samples(config, &start.tokenizer)?;
    let training = config.sft.training();
    let mut run = Run::open(dir, Stage::Sft, config, launch.resume, &launch.world)?;
    run.pin("data", &samples.digest)?;
    run.pin("model", &start.digest()?)?;
    if run.is_finished() {
        tracing::info!("sft: finished before; nothing is left to do");
        return Ok(Outcome::Finished);
    }
    let base = config.model.path.clone().unwrap_or_default();
    let LoadedModel { blueprint, tokenizer, source_config, .. } = start;
    let (seed, role) = (config.run.seed, Role::Actor);
    let plan = Plan { stage: Stage::Sft, training, optimizer: &config.sft.optimizer, seed, role };
    let team = Team::new(launch, &run, Stage::Sft)?;
    let objective = Responses { samples: &samples, loss: config.sft.loss, budget: training.tokens_per_micro_batch };
    let Some(trained) = supervised::train(launch, &mut run, &team, &plan, &blueprint, &objective)? else {
        return Ok(Outcome::Stopped);
    };
    adapters::publish(&trained.model, &config.lora, &base, &mut run)?;
    let results = results(&trained, &objective, &tokenizer, run.seconds());
    let export = run.finish(&results, |staging| {
        models::export(&trained.model, &tokenizer, &source_config, None, config, staging)
    })?;
    launch.say(format_args!("{}\n{}", table(&results), export.display()));
    Ok(Outcome::Finished)
}

/// The model that training starts from.
fn start(config: &Config) -> Result<LoadedModel> {
    match config.sft_model()? {
        ModelSource::Path(path) => models::load_for(config, &path, Head::Language),
        ModelSource::New(new) => models::initial(&new, new_tokenizer(config)?, config.run.seed),
    }
}

/// The tokenizer of a new model.
fn new_tokenizer(config: &Config) -> Result<Tokenizer> {
    let mut tokenizer = match (&config.tokenizer.train, &config.tokenizer.path) {
        (Some(train), _) => train_tokenizer(config, train)?,
        (None, Some(path)) => models::load_tokenizer(path)?,
        (None, None) => return Err(StageError::bug("a new model without a tokenizer was not refused")),
    };
    models::set_template(&mut tokenizer, &config.data)?;
    Ok(tokenizer)
}

/// Prints what would be done, held in memory and sent.
fn plan(launch: &Launch) -> Result<Outcome> {
    let config = &launch.config;
    if let Some(outcome) = dry_run::from_shape(launch, Stage::Sft)? {
        return Ok(outcome);
    }
    let (spec, tokenizer) = match config.sft_model()? {
        ModelSource::Path(path) => {
            let loaded = models::load_for(config, &path, Head::Language)?;
            (loaded.blueprint.spec().clone(), loaded.tokenizer)
        }
        // Its weights need not be drawn.
        ModelSource::New(new) => {
            let tokenizer = new_tokenizer(config)?;
            (new.spec(tokenizer.vocab_size()), tokenizer)
        }
    };
    families::check_expressible(&spec)?;
    dry_run::check_length(&spec, "data.max_tokens", config.data.max_tokens)?;
    let samples = sft_samples(config, &tokenizer)?;
    let (train, eval) = (samples.train.len(), samples.eval.len());
    let steps = config.sft.training().steps(train);
    dry_run::print(launch, Stage::Sft, &spec, &format!("{train} sequences, {eval} held out, {steps} steps"))
}

/// The negative log-likelihood of responses (or of everything).
struct Responses<'a> {
    samples: &'a SftSamples,
    loss: SftLoss,
    /// Most tokens of a forward pass.
    budget: usize,
}

impl Responses<'_> {
    fn sample(&self, row: StepRow) -> &SftSample {
        &self.samples.train[row.index]
    }

    /// Where the tokens begin that are learnt. The first token of all follows nothing and is never learnt.
    fn first(&self, sample: &Encoded) -> usize {
        match self.loss {
            SftLoss::Responses => sample.prompt_len.max(1),
            SftLoss::Everything => 1,
        }
    }

    /// Tokens to learn.
    fn targets<'s>(&self, sample: &'s Encoded) -> &'s [u32] {
        &sample.ids[self.first(sample)..]
    }

    /// Packs samples, and says which rows of the batch predict which labels.
    fn pack<'s>(&self, samples: impl IntoIterator<Item = (&'s Encoded, u64)>) -> (Packed, Vec<u32>, Vec<u32>) {
        let (mut batch, mut rows, mut labels) = (Packed::new(), Vec::new(), Vec::new());
        for (sample, place) in samples {
            let begin = batch.tokens() as u32;
            let (first, end) = (self.first(sample) as u32, sample.ids.len() as u32);
            // A token is predicted by the row before it.
            rows.extend(begin + first - 1..begin + end - 1);
            labels.extend_from_slice(self.targets(sample));
            batch.push(&sample.ids, place);
        }
        (batch, rows, labels)
    }
}

impl Objective for Responses<'_> {
    fn rows(&self) -> usize {
        self.samples.train.len()
    }

    fn tokens(&self, row: StepRow) -> usize {
        self.sample(row).encoded.ids.len()
    }

    fn terms(&self, row: StepRow) -> usize {
        self.targets(&self.sample(row).encoded).len()
    }

    fn origin(&self, row: StepRow) -> String {
        self.sample(row).origin.to_string()
    }

    fn accumulate(
        &self,
        engine: &mut Engine<Train>,
        passes: &[Option<Vec<StepRow>>],
        pass: Pass,
    ) -> Result<Vec<Option<f64>>> {
        let micro_batch = |rows: &Vec<StepRow>| {
            let (batch, rows, labels) = self.pack(rows.iter().map(|&row| (&self.sample(row).encoded, row.place)));
            MicroBatch { batch, rows, labels, dropout: pass.dropout }
        };
        let passes: Vec<_> = passes.iter().map(|rows| rows.as_ref().map(micro_batch)).collect();
        let results = engine.accumulate_all_nll(&passes, pass.recompute)?;
        Ok(results.into_iter().map(|result| result.map(|(sum, _)| sum)).collect())
    }

    /// Perplexity of the held-out samples: `exp(−Σ log π / tokens)`.
    fn evaluate(&self, model: &Model, team: &Team) -> Result<Measures> {
        let lengths: Vec<usize> = self.samples.eval.iter().map(|sample| sample.encoded.ids.len()).collect();
        let (mut sum, mut count) = (0.0, 0);
        let scored = team.score(model, &batches(&lengths, self.budget)?, |group| {
            let samples = group.iter().map(|&index| &self.samples.eval[index].encoded);
            let (batch, rows, labels) = self.pack(samples.zip(0..));
            Ok(model.log_probs(&batch, &rows, &labels)?.logp.to_vec1()?)
        })?;
        for logp in scored {
            sum += logp.iter().map(|&logp| f64::from(logp)).sum::<f64>();
            count += logp.len();
        }
        if count == 0 {
            return Ok(Measures::new());
        }
        Ok(vec![(field::EVAL_PPL, (-sum / count as f64).exp())])
    }
}

/// What the stage has measured, by name.
fn results(
    trained: &Trained,
    objective: &Responses<'_>,
    tokenizer: &Tokenizer,
    seconds: f64,
) -> serde_json::Map<String, serde_json::Value> {
    let mut results = supervised::results(trained, seconds);
    let SftSamples { train, eval, .. } = objective.samples;
    let train = train.iter().map(|sample| objective.targets(&sample.encoded));
    let eval = eval.iter().map(|sample| objective.targets(&sample.encoded));
    if let Some(perplexity) = unigram::perplexity(train, eval, tokenizer.vocab_size()) {
        results.insert(EVAL_UNIGRAM_PPL.into(), json!(perplexity));
    }
    results
}

fn table(results: &serde_json::Map<String, serde_json::Value>) -> Table {
    supervised::table(
        "sft",
        results,
        &[(field::EVAL_PPL, "perplexity, held out"), (EVAL_UNIGRAM_PPL, "  of token frequencies alone")],
    )
}

#[cfg(test)]
mod tests;
