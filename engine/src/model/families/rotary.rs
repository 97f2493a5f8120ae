//! The keys of a `config.json` that speak of rotary positions.
//!
//! transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 one object `rope_parameters`; 5 reads both. What is
//! written here is the older form, which both understand.

use serde_json::{Map, Value, json};
use tandem_kernels::rope::RopeScaling;

use super::config::Config;
use crate::Result;
use crate::model::spec::PositionKind;

/// Base of the frequencies where a config names none.
const DEFAULT_THETA: f64 = 10_000.0;

/// Reads base and scaling of the frequencies; `max_positions` stands in for an absent original context.
pub(super) fn read(config: &Config, max_positions: usize) -> Result<PositionKind> {
    let partial = |config: &Config| match config.positive_if_any("partial_rotary_factor")? {
        Some(share) if share != 1.0 => Err(config.refuse(format!("partial_rotary_factor is {share}, not 1"))),
        _ => Ok(()),
    };
    partial(config)?;
    let theta = config.positive("rope_theta", DEFAULT_THETA)?;
    let parameters = match config.object("rope_scaling")? {
        Some(parameters) => Some(parameters),
        None => config.object("rope_parameters")?,
    };
    let Some(parameters) = parameters else { return Ok(PositionKind::Rotary { theta, scaling: None }) };
    partial(&parameters)?;
    let theta = parameters.positive("rope_theta", theta)?;
    let needed = |key: &str| {
        parameters.positive_if_any(key)?.ok_or_else(|| config.refuse(format!("the rotary scaling lacks {key}")))
    };
    // Before `rope_type` the key was `type`.
    let kind = parameters.text("rope_type", parameters.text("type", "default")?)?;
    let scaling = match kind {
        "default" => None,
        "linear" => Some(RopeScaling::Linear { factor: needed("factor")? }),
        "llama3" => {
            let scaling = RopeScaling::Llama3 {
                factor: needed("factor")?,
                low_freq_factor: needed("low_freq_factor")?,
                high_freq_factor: needed("high_freq_factor")?,
                original_max_positions: parameters.size("original_max_position_embeddings", max_positions)?,
            };
            if needed("high_freq_factor")? <= needed("low_freq_factor")? {
                return Err(config.refuse("high_freq_factor is not above low_freq_factor in the rotary scaling"));
            }
            Some(scaling)
        }
        other => {
            return Err(config.refuse(format!("rotary scaling {other:?}; supported: default, linear, llama3")));
        }
    };
    Ok(PositionKind::Rotary { theta, scaling })
}

/// Writes base and scaling of the frequencies.
pub(super) fn write(positions: &PositionKind, fields: &mut Map<String, Value>) {
    let PositionKind::Rotary { theta, scaling } = positions else { return };
    // The newer object would be a second opinion beside these keys.
    fields.remove("rope_parameters");
    fields.insert("rope_theta".into(), json!(theta));
    let scaling = match *scaling {
        None => Value::Null,
        Some(RopeScaling::Linear { factor }) => json!({ "rope_type": "linear", "type": "linear", "factor": factor }),
        Some(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions }) => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_max_positions,
        }),
    };
    fields.insert("rope_scaling".into(), scaling);
}
