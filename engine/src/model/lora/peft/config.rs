//! `adapter_config.json`.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::model::families;
use crate::model::import::files::read_json;
use crate::model::spec::ModelSpec;
use crate::model::unit::{AdapterSet, Head};
use crate::{Error, LoraConfig, Result};

/// Longest file that is read.
const LIMIT: u64 = 1 << 20;

/// Fields that say nothing of the numbers, or only together with an option that is refused.
const SILENT: [&str; 10] = [
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
];

/// Fields that are read.
const READ: [&str; 7] = ["peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "bias"];

/// The heads that `peft` saves of a classifier without being asked; a model has one of them.
const HEADS: [&str; 2] = ["classifier", "score"];

/// What `peft` calls the task of a head.
fn task(head: Head) -> &'static str {
    match head {
        Head::Language => "CAUSAL_LM",
        Head::Scalar => "SEQ_CLS",
    }
}

pub(super) fn write(config: &LoraConfig, set: &AdapterSet, spec: &ModelSpec, base: &str) -> Value {
    let names = families::names(spec.family);
    let mut targets = config.targets.clone();
    if targets.is_empty() {
        targets = super::super::targets(names).into_iter().map(|(_, name)| super::super::last(name).into()).collect();
        targets.sort();
        targets.dedup();
    }
    let modules_to_save = match set.head {
        Head::Language => Value::Null,
        Head::Scalar => json!(HEADS),
    };
    // Small whole numbers without a point, as peft's own type has them.
    let alpha = match config.alpha {
        alpha if alpha.fract() == 0.0 && alpha < 2f64.powi(53) => json!(alpha as u64),
        alpha => json!(alpha),
    };
    json!({
        "alpha_pattern": {},
        "auto_mapping": null,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": names.inputs_first,
        "inference_mode": true,
        "init_lora_weights": true,
        "layers_pattern": null,
        "layers_to_transform": null,
        "lora_alpha": alpha,
        "lora_dropout": families::shortest(config.dropout),
        "modules_to_save": modules_to_save,
        "peft_type": "LORA",
        "r": config.rank,
        "rank_pattern": {},
        "revision": null,
        "target_modules": targets,
        "task_type": task(set.head),
        "use_dora": false,
        "use_rslora": false,
    })
}

/// The config, and the name of the base, if it is said.
pub(super) fn read(path: &Path, head: Head) -> Result<(LoraConfig, Option<String>)> {
    let fields: Map<String, Value> = read_json(path, LIMIT)?;
    let wrong = |reason: String| {
        Error::model_file(path, reason, "merge the adapters into their model with peft, or make others")
    };
    let unsupported = |key: &str, value: &Value| {
        let shown: String = value.to_string().chars().take(64).collect();
        Err(wrong(format!("its {key} is {shown}, which is not supported")))
    };
    let get = |key: &str| fields.get(key).unwrap_or(&Value::Null);
    if get("peft_type") != "LORA" {
        return unsupported("peft_type", get("peft_type"));
    }
    if !(get("task_type").is_null() || get("task_type") == task(head)) {
        let asked = task(head);
        return Err(wrong(format!("its task_type is {}, where {asked} is needed", get("task_type"))));
    }
    for (key, value) in &fields {
        let known = READ.contains(&key.as_str()) || SILENT.contains(&key.as_str());
        let fine = match key.as_str() {
            "init_lora_weights" => keeps_base(value),
            "modules_to_save" => is_nothing(value) || head == Head::Scalar && is_head(value),
            _ => known || is_nothing(value),
        };
        if !fine {
            return unsupported(key, value);
        }
    }
    if !(get("bias").is_null() || get("bias") == "none") {
        return unsupported("bias", get("bias"));
    }
    let targets = match get("target_modules") {
        Value::String(all) if all == "all-linear" => Vec::new(),
        Value::Array(names) if !names.is_empty() => {
            let names: Option<Vec<String>> = names.iter().map(|name| name.as_str().map(str::to_string)).collect();
            names.ok_or_else(|| wrong("its target_modules are not all names".into()))?
        }
        other => return unsupported("target_modules", other),
    };
    let rank = get("r").as_u64().and_then(|rank| usize::try_from(rank).ok());
    let number = |key: &str, default: f64| match get(key) {
        Value::Null => Ok(default),
        value => value.as_f64().ok_or_else(|| wrong(format!("its {key} is not a number"))),
    };
    let config = LoraConfig {
        rank: rank.ok_or_else(|| wrong("its r is not a whole number".into()))?,
        alpha: number("lora_alpha", 8.0)?,
        dropout: number("lora_dropout", 0.0)? as f32,
        targets,
    };
    Ok((config, get("base_model_name_or_path").as_str().filter(|name| !name.is_empty()).map(str::to_string)))
}

/// Whether an option is off: options of later versions that are off change nothing.
fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Object(fields) => fields.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

/// Whether this way to start leaves the base as it is; some move a part of it into the adapters.
fn keeps_base(init: &Value) -> bool {
    matches!(init, Value::Null | Value::Bool(_)) || matches!(init.as_str(), Some("gaussian" | "eva" | "orthogonal"))
}

fn is_head(modules: &Value) -> bool {
    let is_known = |name: &Value| name.as_str().is_some_and(|name| HEADS.contains(&name));
    modules.as_array().is_some_and(|names| names.iter().all(is_known))
}
