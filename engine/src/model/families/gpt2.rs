//! GPT-2 (Radford et al. 2019): layer norms, learned positions, matrices stored inputs first.

use serde_json::{Map, Value, json};

use super::FamilyFormat;
use super::config::{Config, activation_name, shortest};
use crate::Result;
use crate::model::names::{NameTable, Part};
use crate::model::spec::{Family, ModelSpec, NormKind, PositionKind};

pub(super) const FORMAT: FamilyFormat = FamilyFormat {
    family: Family::Gpt2,
    causal: "GPT2LMHeadModel",
    scalar: "GPT2ForSequenceClassification",
    names: NameTable {
        prefix: "transformer.",
        blocks: "transformer.h.",
        ends: &[
            ("embedding", "transformer.wte"),
            ("positions", "transformer.wpe"),
            ("norm", "transformer.ln_f"),
            ("head", "lm_head"),
            ("score", "score"),
        ],
        block: &[
            ("qkv", Part::Whole, "attn.c_attn"),
            ("output", Part::Whole, "attn.c_proj"),
            ("up", Part::Whole, "mlp.c_fc"),
            ("down", Part::Whole, "mlp.c_proj"),
            ("norm1", Part::Whole, "ln_1"),
            ("norm2", Part::Whole, "ln_2"),
        ],
        inputs_first: true,
        buffers: &[".attn.bias", ".attn.masked_bias"],
    },
    read,
    write,
};

fn read(config: &Config) -> Result<ModelSpec> {
    config.require("scale_attn_weights", true)?;
    config.require("scale_attn_by_inverse_layer_idx", false)?;
    config.require("add_cross_attention", false)?;
    let hidden = size(config, "n_embd", "hidden_size", 768)?;
    let heads = size(config, "n_head", "num_attention_heads", 12)?;
    let layers_key = if config.has("n_layer") { "n_layer" } else { "num_hidden_layers" };
    Ok(ModelSpec {
        family: Family::Gpt2,
        vocab_size: config.size("vocab_size", 50_257)?,
        hidden,
        layers: config.layers(layers_key, 12)?,
        heads,
        kv_heads: heads,
        head_dim: config.head_dim("n_embd", hidden, "n_head", heads)?,
        mlp_width: config.size_if_any("n_inner")?.unwrap_or(4 * hidden),
        activation: config.activation("activation_function", "gelu_new")?,
        gated: false,
        norm: NormKind::Layer,
        norm_eps: config.positive("layer_norm_epsilon", 1e-5)?,
        post_norm: false,
        positions: PositionKind::Learned { offset: 0 },
        max_positions: size(config, "n_positions", "max_position_embeddings", 1_024)?,
        qkv_bias: true,
        output_bias: true,
        mlp_bias: true,
        window: None,
        tied: config.flag("tie_word_embeddings", true)?,
        embedding_width: None,
        init_std: config.positive("initializer_range", 0.02)?,
        dropout: config.probability("resid_pdrop", 0.1)?,
    })
}

/// A size under its own key or the one that other families use, which transformers takes too.
fn size(config: &Config, key: &str, common: &str, default: usize) -> Result<usize> {
    config.size(if config.has(key) { key } else { common }, default)
}

fn write(spec: &ModelSpec, fields: &mut Map<String, Value>) {
    let own = [
        ("vocab_size", json!(spec.vocab_size)),
        ("n_embd", json!(spec.hidden)),
        ("n_layer", json!(spec.layers)),
        ("n_head", json!(spec.heads)),
        ("n_inner", json!(spec.mlp_width)),
        ("n_positions", json!(spec.max_positions)),
        ("activation_function", json!(activation_name(spec.activation))),
        ("layer_norm_epsilon", json!(spec.norm_eps)),
        ("initializer_range", json!(spec.init_std)),
    ];
    fields.extend(own.map(|(key, value)| (key.to_string(), value)));
    // A model made here says its own dropout; one that was imported keeps the three numbers it came with.
    for key in ["resid_pdrop", "embd_pdrop", "attn_pdrop"] {
        fields.entry(key).or_insert_with(|| json!(shortest(spec.dropout)));
    }
}
