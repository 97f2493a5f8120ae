//! Mistral (Jiang et al. 2023): a Llama with a sliding window.

use serde_json::{Map, Value, json};

use super::FamilyFormat;
use super::config::Config;
use super::llama::{self, Defaults};
use crate::Result;
use crate::model::spec::{Family, ModelSpec};

pub(super) const FORMAT: FamilyFormat = FamilyFormat {
    family: Family::Mistral,
    causal: "MistralForCausalLM",
    scalar: "MistralForSequenceClassification",
    names: llama::NAMES,
    read,
    write,
};

fn read(config: &Config) -> Result<ModelSpec> {
    let defaults = Defaults {
        family: Family::Mistral,
        vocab_size: 32_000,
        mlp_width: 14_336,
        heads: 32,
        kv_heads: Some(8),
        max_positions: 131_072,
    };
    // An absent key means the class's default, `null` means no window.
    let default = (!config.has("sliding_window")).then_some(4_096);
    let window = config.size_if_any("sliding_window")?.or(default);
    if config.get("layer_types").is_some() {
        return Err(config.refuse("layer_types: blocks with and without a window in one model are not supported"));
    }
    Ok(ModelSpec { window, ..llama::read_shared(config, &defaults)? })
}

fn write(spec: &ModelSpec, fields: &mut Map<String, Value>) {
    llama::write_shared(spec, fields);
    fields.insert("sliding_window".into(), json!(spec.window));
}
