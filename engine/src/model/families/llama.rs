//! Llama (Touvron et al. 2023) and what shares its shape: RMS norms, rotary positions, a gated MLP. TinyLlama and SmolLM
//! are Llamas by name, too; Mistral and Qwen2 differ in defaults and a few fields.

use serde_json::{Map, Value, json};

use super::config::{Config, activation_name};
use super::{FamilyFormat, rotary};
use crate::Result;
use crate::model::names::{NameTable, Part};
use crate::model::spec::{Family, ModelSpec, NormKind};

pub(super) const FORMAT: FamilyFormat = FamilyFormat {
    family: Family::Llama,
    causal: "LlamaForCausalLM",
    scalar: "LlamaForSequenceClassification",
    names: NAMES,
    read,
    write,
};

/// Names of the tensors of Llama and its kin.
pub(super) const NAMES: NameTable = NameTable {
    prefix: "model.",
    blocks: "model.layers.",
    ends: &[("embedding", "model.embed_tokens"), ("norm", "model.norm"), ("head", "lm_head"), ("score", "score")],
    block: &[
        ("qkv", Part::Query, "self_attn.q_proj"),
        ("qkv", Part::Key, "self_attn.k_proj"),
        ("qkv", Part::Value, "self_attn.v_proj"),
        ("output", Part::Whole, "self_attn.o_proj"),
        ("up", Part::Gate, "mlp.gate_proj"),
        ("up", Part::Up, "mlp.up_proj"),
        ("down", Part::Whole, "mlp.down_proj"),
        ("norm1", Part::Whole, "input_layernorm"),
        ("norm2", Part::Whole, "post_attention_layernorm"),
    ],
    inputs_first: false,
    buffers: &[".rotary_emb.inv_freq"],
};

/// Where the configuration classes of Llama and its kin differ.
pub(super) struct Defaults {
    pub(super) family: Family,
    pub(super) vocab_size: usize,
    pub(super) mlp_width: usize,
    pub(super) heads: usize,
    /// `None`: as many as query heads.
    pub(super) kv_heads: Option<usize>,
    pub(super) max_positions: usize,
}

/// The fields that Llama and its kin share; without biases and without a window.
pub(super) fn read_shared(config: &Config, defaults: &Defaults) -> Result<ModelSpec> {
    let hidden = config.size("hidden_size", 4_096)?;
    let heads = config.grouped_heads(hidden, (defaults.heads, defaults.kv_heads))?;
    let max_positions = config.positions("max_position_embeddings", defaults.max_positions)?;
    Ok(ModelSpec {
        family: defaults.family,
        vocab_size: config.size("vocab_size", defaults.vocab_size)?,
        hidden,
        layers: config.layers("num_hidden_layers", 32)?,
        heads: heads.query,
        kv_heads: heads.key_value,
        head_dim: heads.width,
        mlp_width: config.size("intermediate_size", defaults.mlp_width)?,
        activation: config.activation("hidden_act", "silu")?,
        gated: true,
        norm: NormKind::Rms,
        norm_eps: config.positive("rms_norm_eps", 1e-6)?,
        post_norm: false,
        positions: rotary::read(config, max_positions)?,
        max_positions,
        qkv_bias: false,
        output_bias: false,
        mlp_bias: false,
        window: None,
        tied: config.flag("tie_word_embeddings", false)?,
        embedding_width: None,
        init_std: config.positive("initializer_range", 0.02)?,
        // Their only dropout is that of the attention's probabilities, which is 0 in all published models.
        dropout: 0.0,
    })
}

/// The fields of [`read_shared`].
pub(super) fn write_shared(spec: &ModelSpec, fields: &mut Map<String, Value>) {
    let shared = [
        ("vocab_size", json!(spec.vocab_size)),
        ("hidden_size", json!(spec.hidden)),
        ("num_hidden_layers", json!(spec.layers)),
        ("num_attention_heads", json!(spec.heads)),
        ("num_key_value_heads", json!(spec.kv_heads)),
        ("head_dim", json!(spec.head_dim)),
        ("intermediate_size", json!(spec.mlp_width)),
        ("hidden_act", json!(activation_name(spec.activation))),
        ("rms_norm_eps", json!(spec.norm_eps)),
        ("max_position_embeddings", json!(spec.max_positions)),
        ("initializer_range", json!(spec.init_std)),
    ];
    fields.extend(shared.map(|(key, value)| (key.to_string(), value)));
    rotary::write(&spec.positions, fields);
}

fn read(config: &Config) -> Result<ModelSpec> {
    let defaults = Defaults {
        family: Family::Llama,
        vocab_size: 32_000,
        mlp_width: 11_008,
        heads: 32,
        kv_heads: None,
        max_positions: 2_048,
    };
    let attention_bias = config.flag("attention_bias", false)?;
    Ok(ModelSpec {
        qkv_bias: attention_bias,
        output_bias: attention_bias,
        mlp_bias: config.flag("mlp_bias", false)?,
        ..read_shared(config, &defaults)?
    })
}

fn write(spec: &ModelSpec, fields: &mut Map<String, Value>) {
    write_shared(spec, fields);
    fields.insert("attention_bias".into(), json!(spec.qkv_bias));
    fields.insert("mlp_bias".into(), json!(spec.mlp_bias));
}
