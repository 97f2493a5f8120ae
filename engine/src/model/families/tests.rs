//! Reading and writing of configs, and the completeness of the tables of names.

use std::path::Path;

use serde_json::{Value, json};
use tandem_kernels::mlp::Activation;
use tandem_kernels::rope::RopeScaling;

use super::*;
use crate::model::spec::PositionKind;

fn read(config: Value) -> Result<ModelSpec> {
    read_spec(Path::new("folder/config.json"), &config)
}

fn small(model_type: &str) -> Value {
    json!({ "model_type": model_type, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2 })
}

fn with(mut config: Value, key: &str, value: Value) -> Value {
    config[key] = value;
    config
}

#[test]
fn absent_keys_mean_what_transformers_means() {
    let spec = read(json!({ "model_type": "mistral" })).unwrap();
    assert_eq!((spec.hidden, spec.layers, spec.heads, spec.kv_heads), (4_096, 32, 32, 8));
    assert_eq!((spec.mlp_width, spec.max_positions, spec.window), (14_336, 131_072, Some(4_096)));
    let spec = read(json!({ "model_type": "mistral", "sliding_window": null, "num_key_value_heads": null })).unwrap();
    assert_eq!((spec.window, spec.kv_heads), (None, 32));
    let spec = read(json!({ "model_type": "llama" })).unwrap();
    assert_eq!((spec.kv_heads, spec.head_dim, spec.tied, spec.qkv_bias), (32, 128, false, false));
    let spec = read(json!({ "model_type": "qwen2" })).unwrap();
    assert_eq!((spec.vocab_size, spec.mlp_width, spec.qkv_bias, spec.output_bias), (151_936, 22_016, true, false));
    let spec = read(json!({ "model_type": "gpt2" })).unwrap();
    assert_eq!((spec.hidden, spec.mlp_width, spec.vocab_size, spec.tied), (768, 3_072, 50_257, true));
    assert_eq!((spec.activation, spec.dropout), (Activation::GeluTanh, 0.1));
    let spec = read(json!({ "model_type": "opt" })).unwrap();
    assert_eq!((spec.hidden, spec.mlp_width, spec.activation), (768, 3_072, Activation::Relu));
    assert_eq!((spec.positions.clone(), spec.position_rows()), (PositionKind::Learned { offset: 2 }, Some(2_050)));
}

#[test]
fn old_and_new_rotary_keys_say_the_same() {
    let llama3 = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    });
    let old = with(with(small("llama"), "rope_scaling", llama3.clone()), "rope_theta", json!(500_000.0));
    let new = with(small("llama"), "rope_parameters", with(llama3, "rope_theta", json!(500_000.0)));
    let scaling =
        RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_positions: 8_192 };
    let wanted = PositionKind::Rotary { theta: 500_000.0, scaling: Some(scaling) };
    assert_eq!(read(old).unwrap().positions, wanted);
    assert_eq!(read(new).unwrap().positions, wanted);
    // Older still: `type` instead of `rope_type`.
    let linear = with(small("llama"), "rope_scaling", json!({ "type": "linear", "factor": 2 }));
    let wanted = PositionKind::Rotary { theta: 10_000.0, scaling: Some(RopeScaling::Linear { factor: 2.0 }) };
    assert_eq!(read(linear).unwrap().positions, wanted);
}

#[test]
fn what_would_change_the_numbers_is_refused() {
    for (model_type, key, value) in [
        ("llama", "hidden_act", json!("mish")),
        ("llama", "rope_scaling", json!({ "rope_type": "yarn", "factor": 4.0 })),
        ("llama", "rope_scaling", json!({ "rope_type": "linear" })),
        ("llama", "rope_parameters", json!({ "rope_type": "default", "partial_rotary_factor": 0.5 })),
        ("llama", "partial_rotary_factor", json!(0.25)),
        ("llama", "quantization_config", json!({ "bits": 4 })),
        ("llama", "num_key_value_heads", json!(3)),
        ("llama", "head_dim", json!(7)),
        ("llama", "hidden_size", json!(0)),
        ("llama", "hidden_size", json!(-32)),
        ("llama", "hidden_size", json!("32")),
        ("llama", "hidden_size", json!(9_223_372_036_854_775_808u64)),
        ("llama", "hidden_size", json!(33)),
        ("llama", "num_hidden_layers", json!(1_000_000)),
        ("llama", "max_position_embeddings", json!(1_000_000_000)),
        ("llama", "rms_norm_eps", json!(0)),
        ("llama", "attention_bias", json!("yes")),
        ("mistral", "layer_types", json!(["sliding_attention", "full_attention"])),
        ("qwen2", "layer_types", json!(["full_attention", "sliding_attention"])),
        ("gpt2", "scale_attn_by_inverse_layer_idx", json!(true)),
        ("gpt2", "scale_attn_weights", json!(false)),
        ("gpt2", "add_cross_attention", json!(true)),
        ("gpt2", "resid_pdrop", json!(1.0)),
        ("opt", "layer_norm_elementwise_affine", json!(false)),
        ("opt", "_remove_final_layer_norm", json!(true)),
    ] {
        let config = with(small(model_type), key, value.clone());
        let Err(error) = read(config) else { panic!("{model_type} with {key} = {value} was read") };
        let message = error.to_string();
        // Of what stands in an object or does not fit its neighbour, the message names the other end.
        let others = ["rotary scaling", "partial_rotary_factor", "a multiple of num_attention_heads"];
        let named = message.contains(key) || others.iter().any(|other| message.contains(other));
        assert!(message.contains("folder/config.json") && named, "{model_type} with {key} = {value}: {message}");
    }
    let windowed = with(with(small("qwen2"), "use_sliding_window", json!(true)), "max_window_layers", json!(20));
    assert!(read(windowed.clone()).is_err());
    assert!(read(with(windowed, "max_window_layers", json!(32))).is_ok());
    let error = read(json!({ "model_type": "bert" })).unwrap_err().to_string();
    assert!(error.contains("\"bert\"") && error.contains("llama, mistral, qwen2, gpt2, opt"), "{error}");
    assert!(read(json!([])).is_err());
}

/// One spec per way in which the families differ.
fn specs() -> Vec<ModelSpec> {
    let variants = [
        small("llama"),
        with(with(small("llama"), "attention_bias", json!(true)), "mlp_bias", json!(true)),
        with(small("llama"), "tie_word_embeddings", json!(true)),
        with(small("llama"), "rope_scaling", json!({ "rope_type": "linear", "factor": 2.5 })),
        with(small("mistral"), "head_dim", json!(12)),
        with(small("mistral"), "sliding_window", json!(null)),
        small("qwen2"),
        json!({ "model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_inner": 72, "resid_pdrop": 0.2 }),
        small("opt"),
        with(small("opt"), "do_layer_norm_before", json!(false)),
        with(with(small("opt"), "word_embed_proj_dim", json!(20)), "enable_bias", json!(false)),
        with(small("opt"), "activation_function", json!("gelu")),
    ];
    variants.into_iter().map(|config| read(config).unwrap()).collect()
}

#[test]
fn what_is_written_is_read_back() {
    for spec in specs() {
        let config = write_config(&spec, Head::Language, None, "float32", None);
        assert_eq!(read(config).unwrap(), spec);
        check_expressible(&spec).unwrap();
    }
}

#[test]
fn a_spec_that_no_config_expresses_is_refused() {
    let llama = read(small("llama")).unwrap();
    let odd = ModelSpec { post_norm: true, ..llama.clone() };
    let error = check_expressible(&odd).unwrap_err().to_string();
    assert!(error.contains("llama") && error.contains("post_norm: true"), "{error}");
    assert!(check_expressible(&ModelSpec { output_bias: true, ..llama.clone() }).is_err());
    // The dropout of a recipe is not the model's.
    check_expressible(&ModelSpec { dropout: 0.1, ..llama }).unwrap();
}

#[test]
fn every_element_of_every_parameter_has_one_place_in_the_files() {
    for spec in specs() {
        for head in [Head::Language, Head::Scalar] {
            let maps = tensors(&spec, head).unwrap();
            let mut names: Vec<&String> = maps.iter().map(|map| &map.name).collect();
            names.sort();
            names.dedup();
            assert_eq!(names.len(), maps.len(), "a name stands there twice");
            for layout in UnitLayout::all(&spec, head) {
                for slot in &layout.params {
                    let mut row = 0;
                    for (_, map) in of_unit(&maps, layout.id).filter(|(_, map)| map.param == slot.name) {
                        assert_eq!(map.first_row, row, "{}", map.name);
                        assert_eq!(map.shape.iter().product::<usize>(), map.rows * slot.len() / slot.shape[0]);
                        row += map.rows;
                    }
                    assert_eq!(row, slot.shape[0], "{} of {}", slot.name, spec.family);
                }
            }
        }
    }
}

#[test]
fn reward_scales() {
    let path = Path::new("config.json");
    let scale = RewardScale { mean: 1.5, std: 0.5 };
    let spec = read(small("llama")).unwrap();
    let config = write_config(&spec, Head::Scalar, None, "float32", Some(scale));
    assert_eq!(read_reward_scale(path, &config).unwrap(), Some(scale));
    assert_eq!(scale.apply(2.5), 2.0);
    let without = write_config(&spec, Head::Scalar, Some(&config), "float32", None);
    assert_eq!(read_reward_scale(path, &without).unwrap(), None);
    for broken in [json!({ "reward_mean": 0.0 }), json!({ "reward_mean": 0.0, "reward_std": -1.0 })] {
        assert!(read_reward_scale(path, &json!({ "tandem": broken })).is_err());
    }
}
