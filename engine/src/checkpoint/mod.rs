//! What a checkpoint holds of the engine: weights, both moments and the step, unit by unit, as safetensors.
//!
//! Publishing, digests and falling back to an older checkpoint belong to `tandem-store`; here is only what is inside.

mod file;

use std::sync::Arc;

use tandem_store::{Published, Staging};

use crate::model::Model;
use crate::model::spec::ModelSpec;
use crate::model::unit::{Head, UnitBuffer, UnitLayout};
use crate::train::{Ema, Optimizer, OptimizerConfig};
use crate::{Engine, Error, Result, Train};

/// Writes weights, moments and step of an engine as `{name}.safetensors`, `{name}-first.safetensors` and
/// `{name}-second.safetensors`.
///
/// # Errors
/// If the store refuses.
pub fn save_engine(engine: &Engine<Train>, name: &str, staging: &mut Staging) -> Result<()> {
    save_units(engine.model().units(), name, engine.optimizer().step(), staging)?;
    save_units(engine.optimizer().first_moments(), &first(name), engine.optimizer().step(), staging)?;
    save_units(engine.optimizer().second_moments(), &second(name), engine.optimizer().step(), staging)
}

/// Reads what [`save_engine`] wrote.
///
/// # Errors
/// If a file is missing or does not hold the units of `spec`.
pub fn load_engine(
    spec: &ModelSpec,
    head: Head,
    config: OptimizerConfig,
    name: &str,
    checkpoint: &Published,
) -> Result<Engine<Train>> {
    let (units, step) = load_units(spec, head, name, checkpoint)?;
    let (first, first_step) = load_units(spec, head, &first(name), checkpoint)?;
    let (second, second_step) = load_units(spec, head, &second(name), checkpoint)?;
    if first_step != step || second_step != step {
        return Err(Error::Checkpoint {
            path: checkpoint.dir().to_path_buf(),
            reason: format!("{name} is of step {step}, its moments of steps {first_step} and {second_step}"),
        });
    }
    let model = Model::from_parts(spec.clone(), head, units)?;
    Engine::with_optimizer(model, Optimizer::from_parts(config, step, first, second))
}

/// Writes an average of weights as `{name}.safetensors`.
///
/// # Errors
/// If the store refuses.
pub fn save_ema(ema: &Ema, name: &str, staging: &mut Staging) -> Result<()> {
    save_units(ema.units(), name, 0, staging)
}

/// Reads what [`save_ema`] wrote.
///
/// # Errors
/// If the file is missing or does not hold the units of `spec`.
pub fn load_ema(spec: &ModelSpec, head: Head, decay: f64, name: &str, checkpoint: &Published) -> Result<Ema> {
    Ok(Ema::from_parts(decay, load_units(spec, head, name, checkpoint)?.0))
}

fn first(name: &str) -> String {
    format!("{name}-first")
}

fn second(name: &str) -> String {
    format!("{name}-second")
}

fn save_units(units: &[UnitBuffer], name: &str, step: u64, staging: &mut Staging) -> Result<()> {
    let file_name = format!("{name}.safetensors");
    let mut file = staging.create_file(&file_name)?;
    file::write(units, step, &mut file)
        .map_err(|source| Error::Io { path: std::path::PathBuf::from(file_name), source })?;
    Ok(file.finish()?)
}

fn load_units(spec: &ModelSpec, head: Head, name: &str, checkpoint: &Published) -> Result<(Vec<UnitBuffer>, u64)> {
    let file_name = format!("{name}.safetensors");
    let bytes = checkpoint.read(&file_name)?;
    let layouts: Vec<Arc<UnitLayout>> = UnitLayout::all(spec, head).into_iter().map(Arc::new).collect();
    file::read(&bytes, &layouts).map_err(|reason| Error::Checkpoint { path: checkpoint.dir().join(file_name), reason })
}
