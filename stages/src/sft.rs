//! Supervised fine-tuning: the model learns to write the responses of the data.
//!
//! The loss is the negative log-probability of the response's tokens, the one that ends it among them:
//! `−Σ log π(response_t | prompt, response_<t)`, divided by the number of these tokens in the step.

mod unigram;

use std::path::Path;

use serde_json::json;
use tandem_data::{Encoded, Tokenizer};
use tandem_engine::model::unit::Head;
use tandem_engine::{Engine, Model, Packed, Train};

use crate::cli::{Launch, Outcome};
use crate::config::{Config, SftLoss, Stage};
use crate::dataset::{SftSample, SftSamples, sft_samples, train_tokenizer};
use crate::error::{Result, StageError};
use crate::memory::Memory;
use crate::models::{self, LoadedModel};
use crate::monitor::{Table, field};
use crate::plan::ModelSource;
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
    let start = start(config)?;
    start.check_length("data.max_tokens", config.data.max_tokens)?;
    let samples = sft_samples(config, &start.tokenizer)?;
    let training = config.sft.training();
    if launch.dry_run {
        let (spec, tokens) = (start.model.spec(), training.tokens_per_micro_batch);
        let memory = Memory::new().trained("model", spec, Head::Language, tokens, training.recompute);
        let steps = training.steps(samples.train.len());
        let (train, eval) = (samples.train.len(), samples.eval.len());
        println!("{}\nsft: {train} sequences, {eval} held out, {steps} steps\n\n{memory}", launch.plan_text()?);
        return Ok(Outcome::Finished);
    }
    let mut run = Run::open(dir, Stage::Sft, config, launch.resume)?;
    run.pin("data", &samples.digest)?;
    run.pin("model", &start.digest)?;
    if run.is_finished() {
        tracing::info!("sft: finished before; nothing is left to do");
        return Ok(Outcome::Finished);
    }
    let LoadedModel { model, tokenizer, source_config, .. } = start;
    let plan = Plan { stage: Stage::Sft, training, optimizer: &config.sft.optimizer, seed: config.run.seed };
    let objective = Responses { samples: &samples, loss: config.sft.loss, budget: training.tokens_per_micro_batch };
    let Some(trained) = supervised::train(&mut run, &plan, model, &objective, &launch.stop)? else {
        return Ok(Outcome::Stopped);
    };
    let results = results(&trained, &objective, &tokenizer, run.seconds());
    let export = run.finish(&results, |staging| {
        models::export(&trained.model, &tokenizer, &source_config, None, config, staging)
    })?;
    println!("{}\n{}", table(&results), export.display());
    Ok(Outcome::Finished)
}

/// The model that training starts from.
fn start(config: &Config) -> Result<LoadedModel> {
    match config.sft_model()? {
        ModelSource::Path(path) => models::load_for(config, &path, Head::Language),
        ModelSource::New(new) => {
            let mut tokenizer = match (&config.tokenizer.train, &config.tokenizer.path) {
                (Some(train), _) => train_tokenizer(config, train)?,
                (None, Some(path)) => models::load_tokenizer(path)?,
                (None, None) => return Err(StageError::bug("a new model without a tokenizer was not refused")),
            };
            models::set_template(&mut tokenizer, &config.data)?;
            models::initial(&new, tokenizer, config.run.seed)
        }
    }
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

    fn accumulate(&self, engine: &mut Engine<Train>, rows: &[StepRow], pass: Pass) -> Result<f64> {
        let (batch, rows, labels) = self.pack(rows.iter().map(|&row| (&self.sample(row).encoded, row.place)));
        let (sum, _) = engine.accumulate_log_probs(&batch, &rows, &labels, pass.dropout, pass.recompute, |out| {
            Ok(out.logp.sum_all()?.neg()?)
        })?;
        Ok(sum)
    }

    /// Perplexity of the held-out samples: `exp(−Σ log π / tokens)`.
    fn evaluate(&self, model: &Model) -> Result<Measures> {
        let lengths: Vec<usize> = self.samples.eval.iter().map(|sample| sample.encoded.ids.len()).collect();
        let (mut sum, mut count) = (0.0, 0);
        for group in batches(&lengths, self.budget)? {
            let samples = group.into_iter().map(|index| &self.samples.eval[index].encoded);
            let (batch, rows, labels) = self.pack(samples.zip(0..));
            let logp = model.log_probs(&batch, &rows, &labels)?.logp.to_vec1::<f32>()?;
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
