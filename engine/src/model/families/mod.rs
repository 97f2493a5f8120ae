//! The families of models on disk: how each writes its `config.json` and names its tensors.
//!
//! A family is a table. Nothing here computes, and what computes never asks for the family.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::names::NameTable;
pub use super::names::{Part, TensorMap};
use super::spec::{Family, ModelSpec};
use super::unit::{Head, UnitId, UnitLayout};
use crate::{Error, Result};
use config::Config;
pub(crate) use config::shortest;
pub use reward::RewardScale;

mod config;
mod gpt2;
mod llama;
mod mistral;
mod opt;
mod qwen2;
mod reward;
mod rotary;
#[cfg(test)]
mod tests;

/// Everything that one family's folders have of their own.
struct FamilyFormat {
    family: Family,
    /// transformers' class with a language head.
    causal: &'static str,
    /// transformers' class with a scalar head.
    scalar: &'static str,
    names: NameTable,
    read: fn(&Config) -> Result<ModelSpec>,
    write: fn(&ModelSpec, &mut Map<String, Value>),
}

static FORMATS: [FamilyFormat; 5] = [llama::FORMAT, mistral::FORMAT, qwen2::FORMAT, gpt2::FORMAT, opt::FORMAT];

fn format(family: Family) -> &'static FamilyFormat {
    let index = match family {
        Family::Llama => 0,
        Family::Mistral => 1,
        Family::Qwen2 => 2,
        Family::Gpt2 => 3,
        Family::Opt => 4,
    };
    &FORMATS[index]
}

/// Reads what a `config.json` says of a model; `path` is the file, for messages.
///
/// Both the keys of transformers 4 and of transformers 5 are understood, and absent keys mean what they mean there.
///
/// # Errors
/// If the family is unknown, a key has a wrong type or range, or a key asks for something that would change the numbers
/// and is not computed here.
pub fn read_spec(path: &Path, config: &Value) -> Result<ModelSpec> {
    let fields = Config::new(path, config)?;
    let model_type = fields.text("model_type", "")?;
    let Some(format) = FORMATS.iter().find(|format| format.family.to_string() == model_type) else {
        let known: Vec<String> = FORMATS.iter().map(|format| format.family.to_string()).collect();
        let remedy = format!("supported are {}", known.join(", "));
        return Err(Error::model_file(path, format!("model_type {model_type:?} is not supported"), remedy));
    };
    if fields.get("quantization_config").is_some() {
        let remedy = "take the model's unquantised folder, or a GGUF file of it";
        return Err(Error::model_file(path, "its weights are quantised (quantization_config)", remedy));
    }
    (format.read)(&fields)
}

/// The `config.json` of a model, in keys that transformers 4 and 5 both read. What the model was imported with stays,
/// as far as it says nothing of the model itself; `dtype` is the element type of the weights beside it (`float32` …).
pub fn write_config(
    spec: &ModelSpec,
    head: Head,
    original: Option<&Value>,
    dtype: &str,
    reward_scale: Option<RewardScale>,
) -> Value {
    let format = format(spec.family);
    let mut fields = original.and_then(Value::as_object).cloned().unwrap_or_default();
    // The first two would send a reader to code and folders elsewhere; the others are said anew below, in one way only.
    for key in ["auto_map", "_name_or_path", "dtype", "transformers_version", "num_labels", "id2label", "label2id"] {
        fields.remove(key);
    }
    (format.write)(spec, &mut fields);
    let class = match head {
        Head::Language => format.causal,
        Head::Scalar => format.scalar,
    };
    fields.insert("model_type".into(), json!(spec.family.to_string()));
    fields.insert("architectures".into(), json!([class]));
    fields.insert("torch_dtype".into(), json!(dtype));
    fields.insert("tie_word_embeddings".into(), json!(spec.tied));
    if head == Head::Scalar {
        // transformers counts these to know the number of outputs.
        fields.insert("id2label".into(), json!({ "0": "LABEL_0" }));
        fields.insert("label2id".into(), json!({ "LABEL_0": 0 }));
    }
    RewardScale::write(reward_scale, &mut fields);
    Value::Object(fields)
}

/// Reads the scale of a reward model's scores from its `config.json` at `path`, if it has one.
///
/// # Errors
/// If what is there is not a scale.
pub fn read_reward_scale(path: &Path, config: &Value) -> Result<Option<RewardScale>> {
    RewardScale::read(path, config)
}

/// Every tensor of a model's folder and where it lies in the units, in the order of the units.
///
/// # Errors
/// If the family has no name for a parameter of the spec.
pub fn tensors(spec: &ModelSpec, head: Head) -> Result<Vec<TensorMap>> {
    names(spec.family).tensors(&layouts(spec, head), spec)
}

/// Refuses a spec that its family's `config.json` cannot express, so that a model made from nothing is known to be
/// exportable before it is trained.
///
/// # Errors
/// [`Error::Inexpressible`], naming what would be lost.
pub fn check_expressible(spec: &ModelSpec) -> Result<()> {
    let config = write_config(spec, Head::Language, None, "float32", None);
    // A recipe may train with a dropout that the family's configuration has no key for.
    let read = ModelSpec { dropout: spec.dropout, ..read_spec(Path::new("config.json"), &config)? };
    if read == *spec {
        return Ok(());
    }
    let (ours, theirs) = (format!("{spec:#?}"), format!("{read:#?}"));
    let lost: Vec<&str> = ours.lines().filter(|line| !theirs.contains(*line)).map(str::trim).collect();
    Err(Error::Inexpressible { family: spec.family, what: lost.join(" ") })
}

/// Whether a config says that its model has a scalar head.
pub(crate) fn is_classifier(config: &Value) -> bool {
    let classes = config["architectures"].as_array().into_iter().flatten();
    classes.filter_map(Value::as_str).any(|class| class.ends_with("ForSequenceClassification"))
}

/// The names that a family gives its tensors.
pub(crate) fn names(family: Family) -> &'static NameTable {
    &format(family).names
}

/// The layouts of a model's units, shared.
pub(crate) fn layouts(spec: &ModelSpec, head: Head) -> Vec<Arc<UnitLayout>> {
    UnitLayout::all(spec, head).into_iter().map(Arc::new).collect()
}

/// The maps of one unit out of all.
pub(crate) fn of_unit(maps: &[TensorMap], unit: UnitId) -> impl Iterator<Item = (usize, &TensorMap)> {
    maps.iter().enumerate().filter(move |(_, map)| map.unit == unit)
}
