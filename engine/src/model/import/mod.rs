//! Import: a folder that transformers wrote, or a GGUF file, becomes units.
//!
//! Nothing is loaded loosely: a tensor that is missing, left over or of another shape is an error that lists them all, and so
//! is a weight that is not a finite number. Weights are read a unit at a time; memory beside the unit is a chunk per thread.

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use super::families::{self, RewardScale, TensorMap};
use super::names::Matched;
use super::spec::ModelSpec;
use super::unit::{Head, SCORE, UnitBuffer, UnitLayout};
use super::{Blueprint, Model, gguf};
use crate::{Error, Result};
use files::Shard;

pub(crate) mod files;
pub(crate) mod fill;
pub(crate) mod header;

/// A model as it was found on disk: everything but its weights, which are checked for presence and shape and not yet read.
#[derive(Debug)]
pub struct Opened {
    /// What the model is, and its weights when they are asked for.
    pub blueprint: Blueprint,
    /// Its `config.json`; for a GGUF file, one that says the same.
    pub config: Value,
    /// Mean and spread of its scores, if it is a reward model that knows them.
    pub reward_scale: Option<RewardScale>,
    /// A scalar head was asked for and the folder has none: it starts at zero.
    pub missing_score: bool,
}

/// A model that was read from disk.
#[derive(Debug)]
pub struct Loaded {
    /// What the model is.
    pub spec: ModelSpec,
    /// What its last hidden rows go into.
    pub head: Head,
    /// Its weights: the ends, then the blocks.
    pub units: Vec<UnitBuffer>,
    /// As in [`Opened`].
    pub config: Value,
    /// As in [`Opened`].
    pub reward_scale: Option<RewardScale>,
    /// As in [`Opened`].
    pub missing_score: bool,
}

impl Loaded {
    /// The model itself, and the config to export it with.
    ///
    /// # Errors
    /// If the rotary table cannot be made.
    pub fn into_model(self) -> Result<(Model, Value)> {
        Ok((Model::from_parts(self.spec, self.head, self.units)?, self.config))
    }
}

/// Opens the model folder or GGUF file `path`, for a head of the kind asked for.
///
/// A causal language model can be opened with a scalar head, which then starts at zero. The reverse is an error.
///
/// # Errors
/// If a file is missing or damaged, the model is of an unsupported kind or it cannot have that head. What is wrong with the
/// numbers themselves is said when they are read.
pub fn open(path: &Path, head: Head) -> Result<Opened> {
    if path.is_dir() {
        return open_folder(path, head);
    }
    if !path.exists() {
        let remedy = "name a model folder, a .gguf file or the id of a model on a hub";
        return Err(Error::model_file(path, "there is no such model", remedy));
    }
    if path.extension().is_some_and(|extension| extension == "gguf") {
        return gguf::open(path, head);
    }
    Err(Error::model_file(path, "it is neither a folder nor a .gguf file", "name the folder that holds the model"))
}

/// Opens and reads a model, whole and on this rank alone.
///
/// # Errors
/// As [`open`], and if the weights cannot be read or one is not a finite number.
pub fn load(path: &Path, head: Head) -> Result<Loaded> {
    let Opened { blueprint, config, reward_scale, missing_score } = open(path, head)?;
    let units = blueprint.units().collect::<Result<_>>()?;
    Ok(Loaded { spec: blueprint.spec().clone(), head, units, config, reward_scale, missing_score })
}

fn open_folder(folder: &Path, head: Head) -> Result<Opened> {
    let (config_path, config) = files::read_config(folder)?;
    let spec = families::read_spec(&config_path, &config)?;
    let reward_scale = families::read_reward_scale(&config_path, &config)?;
    let shards = files::open_weights(folder)?;
    let stored: Vec<(usize, usize)> = shards
        .iter()
        .enumerate()
        .flat_map(|(shard, file)| (0..file.tensors.len()).map(move |tensor| (shard, tensor)))
        .collect();
    let shapes: Vec<(&str, &[usize])> = stored
        .iter()
        .map(|&(shard, tensor)| &shards[shard].tensors[tensor])
        .map(|tensor| (tensor.name.as_str(), tensor.shape.as_slice()))
        .collect();
    let has_score = shapes.iter().any(|&(name, _)| name == SCORE);
    let is_classifier = families::is_classifier(&config);
    if head == Head::Language && (has_score || is_classifier) {
        let reason = "it is a reward model (it has a scalar head) where a language model is needed";
        return Err(Error::model_file(folder, reason, "name the language model"));
    }
    let missing_score = head == Head::Scalar && !has_score && !is_classifier;

    let names = families::names(spec.family);
    let mut maps = names.tensors(&families::layouts(&spec, head), &spec)?;
    if missing_score {
        maps.retain(|map| map.param != SCORE);
    }
    let matched = Matched::new(names, &maps, &shapes, |name| names.ignorable(name, &spec, head));
    let sources = sources(folder, matched)?;
    let parts: Vec<(usize, usize)> = sources.into_iter().map(|index| stored[index]).collect();
    let blueprint = Blueprint::new(spec, head, move |layout| load_unit(layout, &maps, &parts, &shards));
    Ok(Opened { blueprint, config, reward_scale, missing_score })
}

/// The index of the found tensor for every map, or the error that lists what does not fit.
pub(crate) fn sources(path: &Path, matched: Matched) -> Result<Vec<usize>> {
    if matched.is_complete() {
        return Ok(matched.found.into_iter().flatten().collect());
    }
    let Matched { missing, unexpected, misshaped, .. } = matched;
    Err(Error::Tensors { path: path.to_path_buf(), missing, unexpected, misshaped })
}

/// Reads one unit; what no map fills stays at zero, where a missing scalar head starts.
fn load_unit(
    layout: &Arc<UnitLayout>,
    maps: &[TensorMap],
    parts: &[(usize, usize)],
    shards: &[Shard],
) -> Result<UnitBuffer> {
    let mut flat = vec![0f32; layout.len()];
    for (index, map) in families::of_unit(maps, layout.id) {
        let (shard, tensor) = parts[index];
        let Shard { path, file, tensors } = &shards[shard];
        fill::fill(&mut flat, layout, map, path, file, &tensors[tensor])?;
    }
    UnitBuffer::from_vec(layout, flat)
}
