//! GGUF: the architectures that are read, and the tokenizer inside.

use std::fs::File;
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value as Field};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use serde_json::json;
use tandem_data::Tokenizer;
use tandem_data::tokenizer::TokenizerFiles;
use tandem_engine::model::families::{TensorMap, tensors};
use tandem_engine::model::gguf;
use tandem_engine::model::import::{Loaded, load};
use tandem_engine::model::unit::Head;
use tandem_tests::golden::{bits, folder, in_file_order};
use tempfile::tempdir;

fn write(path: &Path, fields: &[(&str, Field)], tensors: &[(String, Tensor)]) {
    let quantised: Vec<(&str, QTensor)> = tensors
        .iter()
        .map(|(name, tensor)| (name.as_str(), QTensor::quantize(tensor, GgmlDType::F32).unwrap()))
        .collect();
    let quantised: Vec<(&str, &QTensor)> = quantised.iter().map(|(name, tensor)| (*name, tensor)).collect();
    let fields: Vec<(&str, &Field)> = fields.iter().map(|(key, field)| (*key, field)).collect();
    gguf_file::write(&mut File::create(path).unwrap(), &fields, &quantised).unwrap();
}

/// The tensors of a golden model, outputs first, under the names of llama.cpp.
fn renamed(loaded: &Loaded, names: &[(&str, &str)]) -> Vec<(String, Tensor)> {
    let maps = tensors(&loaded.spec, Head::Language).unwrap();
    let stored = maps.iter().map(|map| {
        let straight = TensorMap { transposed: false, shape: outputs_first(map), ..map.clone() };
        let name = names.iter().fold(map.name.clone(), |name, (theirs, ours)| name.replace(theirs, ours));
        let values = in_file_order(&loaded.units, &straight);
        (name, Tensor::from_vec(values, straight.shape, &Device::Cpu).unwrap())
    });
    stored.collect()
}

fn outputs_first(map: &TensorMap) -> Vec<usize> {
    let mut shape = map.shape.clone();
    if map.transposed {
        shape.reverse();
    }
    shape
}

fn text(text: &str) -> Field {
    Field::String(text.into())
}

#[test]
fn qwen2_with_its_rows_as_they_are() {
    let loaded = load(&folder("qwen2"), Head::Language).unwrap();
    let names = [
        ("model.layers", "blk"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
    ];
    let spec = &loaded.spec;
    let fields = [
        ("general.architecture", text("qwen2")),
        ("qwen2.block_count", Field::U32(spec.layers as u32)),
        ("qwen2.context_length", Field::U32(spec.max_positions as u32)),
        ("qwen2.embedding_length", Field::U32(spec.hidden as u32)),
        ("qwen2.feed_forward_length", Field::U32(spec.mlp_width as u32)),
        ("qwen2.attention.head_count", Field::U32(spec.heads as u32)),
        ("qwen2.attention.head_count_kv", Field::U32(spec.kv_heads as u32)),
        ("qwen2.attention.layer_norm_rms_epsilon", Field::F32(spec.norm_eps as f32)),
        ("qwen2.rope.freq_base", Field::F32(10_000.0)),
    ];
    let root = tempdir().unwrap();
    let path = root.path().join("qwen2.gguf");
    write(&path, &fields, &renamed(&loaded, &names));
    let found = load(&path, Head::Language).unwrap();
    assert_eq!(found.spec, loaded.spec);
    assert_eq!(bits(&found.units), bits(&loaded.units));
}

#[test]
fn gpt2_with_its_matrices_outputs_first() {
    let loaded = load(&folder("gpt2"), Head::Language).unwrap();
    let names = [
        ("transformer.h.", "blk."),
        ("attn.c_attn", "attn_qkv"),
        ("attn.c_proj", "attn_output"),
        ("mlp.c_fc", "ffn_up"),
        ("mlp.c_proj", "ffn_down"),
        ("ln_1", "attn_norm"),
        ("ln_2", "ffn_norm"),
        ("transformer.wte", "token_embd"),
        ("transformer.wpe", "position_embd"),
        ("transformer.ln_f", "output_norm"),
    ];
    let spec = &loaded.spec;
    let fields = [
        ("general.architecture", text("gpt2")),
        ("gpt2.block_count", Field::U32(spec.layers as u32)),
        ("gpt2.context_length", Field::U32(spec.max_positions as u32)),
        ("gpt2.embedding_length", Field::U32(spec.hidden as u32)),
        ("gpt2.feed_forward_length", Field::U32(spec.mlp_width as u32)),
        ("gpt2.attention.head_count", Field::U32(spec.heads as u32)),
        ("gpt2.attention.layer_norm_epsilon", Field::F32(spec.norm_eps as f32)),
    ];
    let mut tensors = renamed(&loaded, &names);
    // llama.cpp's converter stores the tied head once more.
    let (_, embedding) = tensors.iter().find(|(name, _)| name == "token_embd.weight").unwrap();
    tensors.push(("output.weight".into(), embedding.clone()));
    let root = tempdir().unwrap();
    let path = root.path().join("gpt2.gguf");
    write(&path, &fields, &tensors);
    let found = load(&path, Head::Language).unwrap();
    assert_eq!(found.spec.norm_eps, loaded.spec.norm_eps);
    assert_eq!(found.spec.layers, loaded.spec.layers);
    assert_eq!(bits(&found.units), bits(&loaded.units));
}

type Fields = Vec<(&'static str, Field)>;

fn tokenizer_fields(rules: &str) -> Fields {
    let tokens = ["<|im_start|>", "<|im_end|>", "a", "b", "c", "Ġ", "1", "ab", "Ġc", "<tool>"];
    let kinds = [3, 3, 1, 1, 1, 1, 1, 1, 1, 4];
    vec![
        ("general.architecture", text("llama")),
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.pre", text(rules)),
        ("tokenizer.ggml.tokens", Field::Array(tokens.map(text).to_vec())),
        ("tokenizer.ggml.token_type", Field::Array(kinds.map(Field::I32).to_vec())),
        ("tokenizer.ggml.merges", Field::Array(vec![text("a b"), text("Ġ c")])),
        ("tokenizer.ggml.bos_token_id", Field::U32(0)),
        ("tokenizer.ggml.eos_token_id", Field::U32(1)),
        ("tokenizer.ggml.padding_token_id", Field::U32(1)),
        ("tokenizer.chat_template", text("{{ messages[0].content }}")),
    ]
}

#[test]
fn the_tokenizer_inside() {
    let root = tempdir().unwrap();
    let path = root.path().join("tokenizer.gguf");
    write(&path, &tokenizer_fields("smollm"), &[]);
    let made = gguf::tokenizer(&path).unwrap();
    assert_eq!(made.config["bos_token"], "<|im_start|>");
    assert_eq!(made.config["eos_token"], "<|im_end|>");
    assert_eq!(made.config["pad_token"], "<|im_end|>");
    assert_eq!(made.config["chat_template"], "{{ messages[0].content }}");
    let model = &made.tokenizer["model"];
    assert_eq!(model["vocab"]["ab"], 7);
    assert_eq!(model["merges"], json!(["a b", "Ġ c"]));
    assert_eq!(made.tokenizer["post_processor"], json!(null));
    let added = made.tokenizer["added_tokens"].as_array().unwrap();
    let added: Vec<_> =
        added.iter().map(|token| (token["id"].as_u64().unwrap(), token["special"].as_bool().unwrap())).collect();
    assert_eq!(added, [(0, true), (1, true), (9, false)]);
    assert_eq!(
        made.tokenizer["pre_tokenizer"]["pretokenizers"][0],
        json!({ "type": "Digits", "individual_digits": true })
    );

    let files = TokenizerFiles::new(made.tokenizer.to_string().into_bytes()).with_config(&made.config);
    let tokenizer = Tokenizer::from_files("tokenizer.gguf", files).unwrap();
    assert_eq!(tokenizer.encode("ab1 c").unwrap(), [7, 6, 8]);
    assert_eq!(tokenizer.eos(), 1);

    // Llama 3 begins every text with its first token.
    write(&path, &tokenizer_fields("llama-bpe"), &[]);
    let begin = &gguf::tokenizer(&path).unwrap().tokenizer["post_processor"];
    assert_eq!(begin["special_tokens"]["<|im_start|>"]["ids"], json!([0]));
}

#[test]
fn unknown_tokenizers_are_refused() {
    let root = tempdir().unwrap();
    let path = root.path().join("tokenizer.gguf");
    let refused = |change: &dyn Fn(&mut Fields), hint: &str| {
        let mut fields = tokenizer_fields("smollm");
        change(&mut fields);
        write(&path, &fields, &[]);
        let error = gguf::tokenizer(&path).unwrap_err().to_string();
        assert!(error.contains("tokenizer.gguf") && error.contains(hint), "{error}");
    };
    refused(&|fields| fields[1].1 = text("llama"), "only byte-level BPE");
    refused(&|fields| fields[2].1 = text("martian"), "martian");
    refused(&|fields| fields[4].1 = Field::Array(vec![Field::I32(1)]), "kinds of its tokens");
    refused(&|fields| fields[6].1 = Field::U32(99), "not in its vocabulary");
    refused(&|fields| drop(fields.remove(5)), "merges");
}
