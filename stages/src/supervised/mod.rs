//! The loop that `sft` and `reward` share.
//!
//! A step takes the next rows of the epoch, puts them into micro-batches of at most so many tokens, adds up the gradient of
//! the loss's *sum*, divides once by the number of its terms in the whole step, and moves the weights. So the size of the
//! micro-batches changes memory and speed, not the update (beyond rounding).

mod batches;
mod health;
mod state;
mod step;

use serde_json::{Map, Value, json};
use tandem_collective::Tag;
use tandem_data::Sampler;
use tandem_engine::checkpoint::{load_engine, load_lora_engine, save_engine};
use tandem_engine::model::Blueprint;
use tandem_engine::{Dropout, Engine, Model, Recompute, Train};
use tandem_store::Staging;

pub use batches::batches;
pub use step::StepRow;

use crate::adapters;
use crate::cli::Launch;
use crate::config::{OptimizerConfig, Role, Stage, Training};
use crate::error::Result;
use crate::monitor::{MetricsRow, Table, field};
use crate::ranks::Team;
use crate::run::{Run, is_due};
use state::State;

/// What the model's files are called in a checkpoint.
const MODEL: &str = "model";

/// What is learnt from a step's rows.
pub trait Objective {
    /// Training rows.
    fn rows(&self) -> usize;

    /// Tokens that a row puts into a forward pass.
    fn tokens(&self, row: StepRow) -> usize;

    /// Terms that a row adds to the loss: tokens to learn, or one pair.
    fn terms(&self, row: StepRow) -> usize;

    /// Where a row stands, for people.
    fn origin(&self, row: StepRow) -> String;

    /// Adds the gradient of the loss, a sum over the terms of the rows of all `passes`; a pass without rows takes part in what
    /// ranks do together. Returns the sum of each pass that has some, on ranks that know it.
    ///
    /// # Errors
    /// What the engine refuses.
    fn accumulate(
        &self,
        engine: &mut Engine<Train>,
        passes: &[Option<Vec<StepRow>>],
        pass: Pass,
    ) -> Result<Vec<Option<f64>>>;

    /// Measures the model on held-out rows: names of [`crate::monitor::field`] and values. Empty if nothing is held out.
    ///
    /// # Errors
    /// What the engine refuses.
    fn evaluate(&self, model: &Model, team: &Team) -> Result<Measures>;
}

/// What an evaluation has found, by field.
pub type Measures = Vec<(&'static str, f64)>;

/// How the forward passes of a step are run.
#[derive(Debug, Clone, Copy)]
pub struct Pass {
    /// Dropout of this step.
    pub dropout: Option<Dropout>,
    /// Whether activations are kept.
    pub recompute: Recompute,
}

/// What is trained how.
#[derive(Debug, Clone)]
pub struct Plan<'a> {
    /// The stage, for messages.
    pub stage: Stage,
    /// How long, and in what portions.
    pub training: Training,
    /// The optimizer.
    pub optimizer: &'a OptimizerConfig,
    /// Seed of order and dropout.
    pub seed: u64,
    /// Whose place the model takes.
    pub role: Role,
}

/// A model that has been trained to the end.
#[derive(Debug)]
pub struct Trained {
    /// The model.
    pub model: Model,
    /// Its last evaluation.
    pub measures: Measures,
    /// Optimizer steps, those included that were left out because a number was not finite.
    pub steps: u64,
    /// Steps left out.
    pub skipped: u64,
    /// Tokens that went through the model in training.
    pub tokens: u64,
}

/// Trains the model of `blueprint` (or what the run's checkpoint holds) until the plan's last step. `None`: stopped on request, saved.
///
/// # Errors
/// [`crate::error::StageError::Numerical`] after several steps in a row whose numbers were not finite, and what the engine or the
/// store refuses.
pub fn train(
    launch: &Launch,
    run: &mut Run,
    team: &Team,
    plan: &Plan<'_>,
    blueprint: &Blueprint,
    objective: &dyn Objective,
) -> Result<Option<Trained>> {
    let total = plan.training.steps(objective.rows());
    let optimizer = launch.config.lora.optimizer(plan.optimizer).build(total);
    let placement = team.placement(plan.role)?;
    let (mut engine, mut state) = match run.resume_point() {
        Some(point) => {
            let (spec, head, files) = (blueprint.spec(), blueprint.head(), &point.files);
            let engine = match adapters::config(&launch.config.lora, spec, head)? {
                Some(lora) => {
                    let base = blueprint.place(&placement)?;
                    load_lora_engine(base, &lora, optimizer, MODEL, files, &placement)?
                }
                None => load_engine(spec, head, optimizer, MODEL, files, &placement)?,
            };
            (engine, point.state::<State>()?)
        }
        None => {
            let model = adapters::attach(blueprint.place(&placement)?, &launch.config.lora, plan.seed, &placement)?;
            (Engine::placed(model, optimizer, placement)?, State::default())
        }
    };
    let mut sampler = Sampler::new(objective.rows(), plan.seed)?.resume(state.cursor)?;
    let mut progress = launch.progress(plan.stage.name(), total, state.step);
    let mut measures = None;

    while state.step < total {
        let rows = step::next_rows(&mut sampler, plan.training.rows_per_step);
        let report = step::step(&mut engine, team, objective, &rows, state.step + 1, plan)?;
        state.count(&report, sampler.cursor());
        let mut row = report.metrics(state.step, objective, &rows);
        let is_last = state.step == total;
        if is_last || is_due(state.step, plan.training.eval_every) {
            // Ranks that make steps by themselves come to one model first.
            engine.join_ranks()?;
            measures = Some(measure(objective, engine.model(), team, &mut row)?);
        }
        run.log(&row)?;
        progress.update(state.step, &figures(&row, measures.as_ref()));
        health::check(&state)?;
        if is_last {
            run.save_now(state.step, &state, |staging| save(&engine, staging))?;
        } else {
            if is_due(state.step, plan.training.checkpoint_every) {
                run.save(state.step, &state, |staging| save(&engine, staging))?;
            }
            if launch.should_stop(Tag::new("supervised/stop", state.step))? {
                run.save_now(state.step, &state, |staging| save(&engine, staging))?;
                progress.finish();
                return Ok(None);
            }
        }
    }
    progress.finish();
    let measures = match measures {
        Some(measures) => measures,
        // The last step was made by an earlier process.
        None => objective.evaluate(engine.model(), team)?,
    };
    let model = engine.model().clone();
    Ok(Some(Trained { model, measures, steps: state.step, skipped: state.skipped, tokens: state.tokens }))
}

/// Brings weights and optimizer state together, and writes them where there is somewhere to write to.
fn save(engine: &Engine<Train>, staging: Option<&mut Staging>) -> Result<()> {
    Ok(save_engine(engine, MODEL, staging)?)
}

fn measure(objective: &dyn Objective, model: &Model, team: &Team, row: &mut MetricsRow) -> Result<Measures> {
    let measures = objective.evaluate(model, team)?;
    for &(field, value) in &measures {
        row.set(field, value);
    }
    Ok(measures)
}

/// Loss of the step and the newest evaluation, in a few characters.
fn figures(row: &MetricsRow, measures: Option<&Measures>) -> String {
    let loss = row.get(field::LOSS).map_or("not finite".to_owned(), |loss| format!("{loss:.3}"));
    let measured = measures.into_iter().flatten().map(|(field, value)| format!(", {field} {value:.3}"));
    format!("loss {loss}{}", measured.collect::<String>())
}

/// What a supervised stage has measured, by name: for `run.json` and for [`table`].
pub fn results(trained: &Trained, seconds: f64) -> Map<String, Value> {
    let mut results = Map::new();
    for &(field, value) in &trained.measures {
        results.insert(field.into(), json!(value));
    }
    results.insert("steps".into(), json!(trained.steps));
    results.insert("skipped_steps".into(), json!(trained.skipped));
    results.insert("tokens".into(), json!(trained.tokens));
    results.insert("seconds".into(), json!((seconds * 10.0).round() / 10.0));
    results
}

/// The summary at the end of `stage`: first the results named in `shown`, where there are such, then what every stage has.
pub fn table(stage: &str, results: &Map<String, Value>, shown: &[(&str, &str)]) -> Table {
    const COMMON: [(&str, &str); 3] = [("steps", "steps"), ("tokens", "tokens"), ("seconds", "seconds")];
    let mut table = Table::new([stage, ""]);
    for (name, label) in shown.iter().chain(&COMMON) {
        match results.get(*name) {
            Some(Value::Number(number)) if number.is_f64() => {
                table.row([*label, &format!("{:.3}", number.as_f64().unwrap_or(f64::NAN))]);
            }
            Some(value) => {
                table.row([*label, &value.to_string()]);
            }
            None => {}
        }
    }
    table
}
