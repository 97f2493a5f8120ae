//! OPT (Zhang et al. 2022): learned positions with an offset of two, ReLU; 350m has its norms after the residual sums and
//! a narrower embedding with projections.

use serde_json::{Map, Value, json};

use super::FamilyFormat;
use super::config::{Config, activation_name, shortest};
use crate::Result;
use crate::model::names::{NameTable, Part};
use crate::model::spec::{Family, ModelSpec, NormKind, PositionKind};

/// The first rows of the position table that no token uses.
const POSITION_OFFSET: usize = 2;

pub(super) const FORMAT: FamilyFormat = FamilyFormat {
    family: Family::Opt,
    causal: "OPTForCausalLM",
    scalar: "OPTForSequenceClassification",
    names: NameTable {
        prefix: "model.",
        blocks: "model.decoder.layers.",
        ends: &[
            ("embedding", "model.decoder.embed_tokens"),
            ("positions", "model.decoder.embed_positions"),
            ("project_in", "model.decoder.project_in"),
            ("project_out", "model.decoder.project_out"),
            ("norm", "model.decoder.final_layer_norm"),
            ("head", "lm_head"),
            ("score", "score"),
        ],
        block: &[
            ("qkv", Part::Query, "self_attn.q_proj"),
            ("qkv", Part::Key, "self_attn.k_proj"),
            ("qkv", Part::Value, "self_attn.v_proj"),
            ("output", Part::Whole, "self_attn.out_proj"),
            ("up", Part::Whole, "fc1"),
            ("down", Part::Whole, "fc2"),
            ("norm1", Part::Whole, "self_attn_layer_norm"),
            ("norm2", Part::Whole, "final_layer_norm"),
        ],
        inputs_first: false,
        buffers: &[],
    },
    read,
    write,
};

fn read(config: &Config) -> Result<ModelSpec> {
    config.require("layer_norm_elementwise_affine", true)?;
    let post_norm = !config.flag("do_layer_norm_before", true)?;
    if !post_norm {
        config.require("_remove_final_layer_norm", false)?;
    }
    let hidden = config.size("hidden_size", 768)?;
    let heads = config.size("num_attention_heads", 12)?;
    let biases = config.flag("enable_bias", true)?;
    Ok(ModelSpec {
        family: Family::Opt,
        vocab_size: config.size("vocab_size", 50_272)?,
        hidden,
        layers: config.layers("num_hidden_layers", 12)?,
        heads,
        kv_heads: heads,
        head_dim: config.head_dim("hidden_size", hidden, "num_attention_heads", heads)?,
        mlp_width: config.size("ffn_dim", 3_072)?,
        activation: config.activation("activation_function", "relu")?,
        gated: false,
        norm: NormKind::Layer,
        // The configuration has no key for it.
        norm_eps: 1e-5,
        post_norm,
        positions: PositionKind::Learned { offset: POSITION_OFFSET },
        max_positions: config.size("max_position_embeddings", 2_048)?,
        qkv_bias: biases,
        output_bias: biases,
        mlp_bias: biases,
        window: None,
        tied: config.flag("tie_word_embeddings", true)?,
        embedding_width: config.size_if_any("word_embed_proj_dim")?.filter(|&width| width != hidden),
        init_std: config.positive("init_std", 0.02)?,
        dropout: config.probability("dropout", 0.1)?,
    })
}

fn write(spec: &ModelSpec, fields: &mut Map<String, Value>) {
    let own = [
        ("vocab_size", json!(spec.vocab_size)),
        ("hidden_size", json!(spec.hidden)),
        ("num_hidden_layers", json!(spec.layers)),
        ("num_attention_heads", json!(spec.heads)),
        ("ffn_dim", json!(spec.mlp_width)),
        ("max_position_embeddings", json!(spec.max_positions)),
        ("word_embed_proj_dim", json!(spec.embedding_width())),
        ("activation_function", json!(activation_name(spec.activation))),
        ("do_layer_norm_before", json!(!spec.post_norm)),
        ("enable_bias", json!(spec.qkv_bias)),
        ("init_std", json!(spec.init_std)),
    ];
    fields.extend(own.map(|(key, value)| (key.to_string(), value)));
    fields.entry("dropout").or_insert_with(|| json!(shortest(spec.dropout)));
}
