//! What `--dry-run` prints.

use tandem_engine::model::spec::ModelSpec;

use crate::cli::{Launch, Outcome};
use crate::config::{ConfigError, Origin, Stage};
use crate::dataset::stage_rows;
use crate::error::Result;
use crate::footprint::Footprint;

/// Prints the plan of `stage`: the configuration, `work` in words, and what each rank will hold and send.
///
/// # Errors
/// None for a configuration that was read from TOML.
pub(crate) fn print(launch: &Launch, stage: Stage, spec: &ModelSpec, work: &str) -> Result<Outcome> {
    let footprint = Footprint::new(&launch.config, stage, spec, launch.mesh, launch.nodes);
    launch.say(format_args!("{}\n{stage}: {work}\n\n{footprint}", launch.plan_text()?));
    Ok(Outcome::Finished)
}

/// Prints the plan of `stage` from `[model.shape]`, without any file of a model; `None` if that is not given.
///
/// # Errors
/// Data that cannot be used, and samples longer than the model takes.
pub(crate) fn from_shape(launch: &Launch, stage: Stage) -> Result<Option<Outcome>> {
    let config = &launch.config;
    let Some(shape) = &config.model.shape else { return Ok(None) };
    let spec = shape.spec();
    let (key, tokens) = match stage {
        Stage::Sft | Stage::Reward => ("data.max_tokens", config.data.max_tokens),
        Stage::Ppo => ("ppo.max_prompt_tokens + ppo.max_response_tokens", config.ppo.longest_sequence()),
    };
    check_length(&spec, key, tokens)?;
    let rows = stage_rows(config, stage)?;
    let work = format!("{} rows, {} held out; from model.shape", rows.train.len(), rows.eval.len());
    print(launch, stage, &spec, &work).map(Some)
}

/// Refuses samples of a length that a model has no positions for.
///
/// # Errors
/// [`ConfigError::Invalid`], if `tokens`, which `key` says, are too many.
pub(crate) fn check_length(spec: &ModelSpec, key: &str, tokens: usize) -> Result<()> {
    let most = spec.max_positions;
    if tokens <= most {
        return Ok(());
    }
    let problem = format!("`{key}` is {tokens}; the model takes at most {most} tokens");
    Err(ConfigError::Invalid { origin: Origin::Defaults, problems: vec![problem] }.into())
}
