//! Qwen2 and Qwen2.5 (Yang et al. 2024): a Llama with biases on the q, k and v projections.

use serde_json::{Map, Value, json};

use super::FamilyFormat;
use super::config::Config;
use super::llama::{self, Defaults};
use crate::Result;
use crate::model::spec::{Family, ModelSpec};

pub(super) const FORMAT: FamilyFormat = FamilyFormat {
    family: Family::Qwen2,
    causal: "Qwen2ForCausalLM",
    scalar: "Qwen2ForSequenceClassification",
    names: llama::NAMES,
    read,
    write,
};

fn read(config: &Config) -> Result<ModelSpec> {
    let defaults = Defaults {
        family: Family::Qwen2,
        vocab_size: 151_936,
        mlp_width: 22_016,
        heads: 32,
        kv_heads: Some(32),
        max_positions: 32_768,
    };
    let spec = llama::read_shared(config, &defaults)?;
    refuse_windows(config, spec.layers)?;
    Ok(ModelSpec { qkv_bias: true, ..spec })
}

/// A window may be named and off, or begin beyond the last block: then there is none.
fn refuse_windows(config: &Config, layers: usize) -> Result<()> {
    let from = match config.get("max_window_layers") {
        None => 28,
        Some(value) => value.as_u64().ok_or_else(|| config.refuse("max_window_layers is not a whole number"))?,
    };
    let listed = config.get("layer_types").and_then(Value::as_array);
    let windowed = match listed {
        Some(kinds) => kinds.iter().any(|kind| kind != "full_attention"),
        None => config.flag("use_sliding_window", false)? && from < layers as u64,
    };
    if windowed {
        return Err(config.refuse(
            "use_sliding_window or layer_types give some blocks a sliding window, which is not supported for Qwen2",
        ));
    }
    Ok(())
}

fn write(spec: &ModelSpec, fields: &mut Map<String, Value>) {
    llama::write_shared(spec, fields);
    fields.insert("use_sliding_window".into(), json!(false));
}
