//! Import and export lose nothing: the same weights come back, the same bytes go out, whatever the format in between.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use tandem_engine::model::export::{ExportDtype, ExportOptions, SpecialIds};
use tandem_engine::model::families::RewardScale;
use tandem_engine::model::import::{Loaded, load};
use tandem_engine::model::unit::Head;
use tandem_tests::golden::{CAUSAL, Vectors, assert_close, bits, export, floats, folder};
use tempfile::tempdir;

fn language(name: &str) -> Loaded {
    load(&folder(name), Head::Language).unwrap()
}

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Name and bytes of every file but the manifest.
fn bytes_of(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<(String, Vec<u8>)> = folder
        .read_dir()
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| !path.ends_with("manifest.json"))
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read(&path).unwrap()))
        .collect();
    files.sort();
    files
}

/// All tensors of a folder.
fn tensors_of(folder: &Path) -> HashMap<String, Tensor> {
    let weights = folder.read_dir().unwrap().map(|entry| entry.unwrap().path());
    let weights = weights.filter(|path| {
        let name = path.file_name().unwrap().to_string_lossy();
        name.starts_with("model") && name.ends_with(".safetensors")
    });
    weights.flat_map(|path| candle_core::safetensors::load(path, &Device::Cpu).unwrap()).collect()
}

fn write_tensors(path: &Path, tensors: &HashMap<String, Tensor>) {
    candle_core::safetensors::save(tensors, path).unwrap();
}

/// A copy of a golden folder without its vectors, its weights in one file and changed by `change`.
fn changed(name: &str, root: &Path, change: impl FnOnce(&mut HashMap<String, Tensor>)) -> PathBuf {
    let copy = root.join(name);
    fs::create_dir(&copy).unwrap();
    fs::copy(folder(name).join("config.json"), copy.join("config.json")).unwrap();
    let mut tensors = tensors_of(&folder(name));
    change(&mut tensors);
    write_tensors(&copy.join("model.safetensors"), &tensors);
    copy
}

#[test]
fn import_then_export_then_import_changes_no_bit() {
    for (name, head) in CAUSAL.map(|name| (name, Head::Language)).into_iter().chain([("llama-reward", Head::Scalar)]) {
        let (first, second) = (tempdir().unwrap(), tempdir().unwrap());
        let loaded = load(&folder(name), head).unwrap();
        let exported = export(first.path(), &loaded, &ExportOptions::default()).unwrap();
        let again = load(&exported, head).unwrap();
        assert_eq!(again.spec, loaded.spec, "{name}");
        assert_eq!(bits(&again.units), bits(&loaded.units), "{name}");
        let twice = export(second.path(), &again, &ExportOptions::default()).unwrap();
        assert_eq!(bytes_of(&exported), bytes_of(&twice), "{name}");

        let (original, ours) = (tensors_of(&folder(name)), tensors_of(&exported));
        assert_eq!(original.len(), ours.len(), "{name}");
        for (tensor, wanted) in &original {
            assert_eq!(wanted.dims(), ours[tensor].dims(), "{name}: {tensor}");
            assert_eq!(floats(wanted), floats(&ours[tensor]), "{name}: {tensor}");
        }
        // transformers lays one-file folders out in the same way, so that even the file is the same.
        let single = folder(name).join("model.safetensors");
        if single.exists() {
            assert_eq!(fs::read(single).unwrap(), fs::read(exported.join("model.safetensors")).unwrap(), "{name}");
        }
    }
}

#[test]
fn shards_are_bounded_and_come_together_again() {
    let root = tempdir().unwrap();
    let loaded = language("llama");
    let options = ExportOptions { max_shard_bytes: 20_000, ..ExportOptions::default() };
    let exported = export(root.path(), &loaded, &options).unwrap();
    let sizes: Vec<usize> = bytes_of(&exported)
        .into_iter()
        .filter(|(name, _)| name.ends_with(".safetensors"))
        .map(|(_, bytes)| bytes.len())
        .collect();
    assert!(sizes.len() > 4 && sizes.iter().all(|&size| size < 22_000), "{sizes:?}");
    let index = json_of(&exported.join("model.safetensors.index.json"));
    assert_eq!(
        index["metadata"]["total_size"],
        json!(loaded.units.iter().map(|u| 4 * u.layout().len()).sum::<usize>())
    );
    assert_eq!(bits(&load(&exported, Head::Language).unwrap().units), bits(&loaded.units));
}

#[test]
fn half_precision_rounds_once_and_then_stays() {
    let types = [(ExportDtype::Bf16, DType::BF16, "bfloat16"), (ExportDtype::F16, DType::F16, "float16")];
    for (dtype, half, name) in types {
        let (first, second) = (tempdir().unwrap(), tempdir().unwrap());
        let options = ExportOptions { dtype, ..ExportOptions::default() };
        let loaded = language("gpt2");
        let exported = export(first.path(), &loaded, &options).unwrap();
        assert_eq!(json_of(&exported.join("config.json"))["torch_dtype"], name);
        let rounded = load(&exported, Head::Language).unwrap();
        for (rounded, exact) in rounded.units.iter().zip(&loaded.units) {
            let wanted = exact.flat().to_dtype(half).unwrap().to_dtype(DType::F32).unwrap();
            assert_eq!(floats(rounded.flat()), floats(&wanted));
        }
        assert_eq!(bytes_of(&exported), bytes_of(&export(second.path(), &rounded, &options).unwrap()));
    }
}

#[test]
fn weights_that_a_type_cannot_hold_are_not_exported() {
    let (root, out) = (tempdir().unwrap(), tempdir().unwrap());
    let large = changed("llama", root.path(), |tensors| {
        tensors.insert("model.norm.weight".into(), Tensor::full(70_000f32, 32, &Device::Cpu).unwrap());
    });
    let loaded = load(&large, Head::Language).unwrap();
    let options = ExportOptions { dtype: ExportDtype::F16, ..ExportOptions::default() };
    let error = export(out.path(), &loaded, &options).unwrap_err().to_string();
    assert!(error.contains("model.norm.weight") && error.contains("float16"), "{error}");
    assert!(!out.path().join("export").exists());
}

#[test]
fn a_config_keeps_what_it_says_beside_the_model() {
    let (root, out) = (tempdir().unwrap(), tempdir().unwrap());
    let source = changed("llama", root.path(), |_| {});
    let mut config = json_of(&source.join("config.json"));
    config["pretraining_tp"] = json!(1);
    config["house_style"] = json!({ "kept": true });
    config["auto_map"] = json!({ "AutoModel": "elsewhere--code.Model" });
    fs::write(source.join("config.json"), config.to_string()).unwrap();

    let ids = SpecialIds { bos: Some(5), eos: vec![6, 7], pad: Some(8) };
    let options = ExportOptions { special_ids: ids, ..ExportOptions::default() };
    let exported = export(out.path(), &load(&source, Head::Language).unwrap(), &options).unwrap();
    let written = json_of(&exported.join("config.json"));
    assert_eq!(written["house_style"], config["house_style"]);
    assert_eq!(written["auto_map"], Value::Null);
    assert_eq!(written["architectures"], json!(["LlamaForCausalLM"]));
    let generation = json_of(&exported.join("generation_config.json"));
    for written in [written, generation] {
        assert_eq!(written["bos_token_id"], 5);
        assert_eq!(written["eos_token_id"], json!([6, 7]));
        assert_eq!(written["pad_token_id"], 8);
    }
}

#[test]
fn a_language_model_becomes_a_reward_model_that_knows_its_scale() {
    for name in ["llama", "gpt2", "opt-350m"] {
        let root = tempdir().unwrap();
        let loaded = load(&folder(name), Head::Scalar).unwrap();
        assert!(loaded.missing_score && loaded.reward_scale.is_none());
        assert!(floats(&loaded.units[0].get("score.weight").unwrap()).iter().all(|&weight| weight == 0.0));

        let scale = RewardScale { mean: -0.75, std: 2.5 };
        let options = ExportOptions { reward_scale: Some(scale), ..ExportOptions::default() };
        let exported = export(root.path(), &loaded, &options).unwrap();
        let config = json_of(&exported.join("config.json"));
        assert!(config["architectures"][0].as_str().unwrap().ends_with("ForSequenceClassification"), "{config}");
        assert_eq!(config["id2label"], json!({ "0": "LABEL_0" }));
        let again = load(&exported, Head::Scalar).unwrap();
        assert!(!again.missing_score);
        assert_eq!(again.reward_scale, Some(scale));
        assert_eq!(bits(&again.units), bits(&loaded.units));

        let error = load(&exported, Head::Language).unwrap_err().to_string();
        assert!(error.contains("reward model"), "{error}");
    }
}

#[test]
fn old_folders_without_prefix_and_with_stored_buffers_load() {
    let root = tempdir().unwrap();
    let bare = |prefix: &'static str| {
        move |tensors: &mut HashMap<String, Tensor>| {
            *tensors = tensors
                .drain()
                .map(|(name, tensor)| (name.strip_prefix(prefix).unwrap_or(&name).to_string(), tensor))
                .collect();
        }
    };
    for (name, prefix) in [("gpt2", "transformer."), ("opt", "model."), ("llama-tied", "model.")] {
        let old = changed(name, root.path(), |tensors| {
            bare(prefix)(tensors);
            if name == "gpt2" {
                let mask = Tensor::ones((1, 1, 64, 64), DType::U8, &Device::Cpu).unwrap();
                tensors.insert("h.0.attn.bias".into(), mask);
                tensors.insert("h.1.attn.masked_bias".into(), Tensor::new(-1e4f32, &Device::Cpu).unwrap());
            }
            if name == "llama-tied" {
                let frequencies = Tensor::ones(4, DType::F32, &Device::Cpu).unwrap();
                tensors.insert("layers.0.self_attn.rotary_emb.inv_freq".into(), frequencies);
                tensors.insert("lm_head.weight".into(), tensors["embed_tokens.weight"].clone());
            }
        });
        assert_eq!(bits(&load(&old, Head::Language).unwrap().units), bits(&language(name).units), "{name}");
    }
}

#[test]
fn gguf_gives_the_weights_of_the_folder() {
    let exact = load(&folder("llama-gguf").join("model-f32.gguf"), Head::Language).unwrap();
    let wanted = language("llama");
    assert_eq!(exact.spec, wanted.spec);
    assert_eq!(bits(&exact.units), bits(&wanted.units));
    // The config made from its metadata serves for an export.
    let root = tempdir().unwrap();
    let exported = export(root.path(), &exact, &ExportOptions::default()).unwrap();
    assert_eq!(load(&exported, Head::Language).unwrap().spec, wanted.spec);

    let (quantised, _) =
        load(&folder("llama-gguf").join("model-q8_0.gguf"), Head::Language).unwrap().into_model().unwrap();
    let vectors = Vectors::read(&folder("llama-gguf").join("vectors-q8_0.safetensors"));
    assert_close("q8_0", &floats(&quantised.logits(&vectors.batch()).unwrap()), &vectors.floats("logits"));

    let scalar = load(&folder("llama-gguf").join("model-f32.gguf"), Head::Scalar).unwrap();
    assert!(scalar.missing_score);
}
