//! Adapters in the format of the Python package `peft`: written, read back, and refused.

use std::path::Path;

use serde_json::{Value, json};
use tandem_engine::lora::peft::{read, write};
use tandem_engine::model::export::{self, ExportOptions};
use tandem_engine::model::import::load;
use tandem_engine::model::unit::Head;
use tandem_engine::parallel::{ParallelConfig, Placement, ZeroStage};
use tandem_engine::{LoraConfig, Model};
use tandem_store::RunDir;

use crate::adapted::{FAMILIES, adapted, all_bits, base, config, golden};
use crate::ranks::on_ranks;
use crate::toy::Layout;

/// Writes the adapters of `family` as two ranks that hold slices of them, or one, into a folder of their own.
fn written(family: &str, lora: &LoraConfig, ranks: usize, root: &Path) -> std::path::PathBuf {
    let run = RunDir::open(root).unwrap();
    let layout = Layout::of(ranks, ZeroStage::Three, ParallelConfig::default());
    on_ranks(ranks, |world| {
        let placement = layout.placement(&world).unwrap();
        let model = adapted(base(family).place(&placement).unwrap(), lora, &placement).unwrap();
        let mut staging = (world.rank() == 0).then(|| run.stage_export().unwrap());
        write(&model, "some/base", staging.as_mut()).unwrap();
        staging.map(|staging| staging.publish(json!({})).unwrap());
    });
    run.export_path()
}

/// Names and shapes in a safetensors file.
fn listed(path: &Path) -> Vec<(String, Vec<usize>)> {
    let bytes = std::fs::read(path).unwrap();
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let mut all: Vec<_> = metadata.tensors().into_iter().map(|(name, info)| (name, info.shape.clone())).collect();
    all.sort();
    all
}

#[test]
fn what_is_written_is_read_back_bit_for_bit() {
    for family in FAMILIES {
        let model = base(family);
        for (ranks, lora) in [(1, config(4, 0.05)), (2, LoraConfig { alpha: 2.5, ..config(3, 0.0) })] {
            let dir = tempfile::tempdir().unwrap();
            let folder = written(family, &lora, ranks, dir.path());
            let found = read(&folder, model.spec(), Head::Language).unwrap();
            assert_eq!(found.base.as_deref(), Some("some/base"));
            assert_eq!(
                (found.config.rank, found.config.alpha, found.config.dropout),
                (lora.rank, lora.alpha, lora.dropout)
            );
            assert!(!found.config.targets.is_empty(), "all targets, each by its name");
            let placement = Placement::solo();
            let expected = adapted(model.clone(), &lora, &placement).unwrap();
            let again = model.clone().with_adapters(&found.config, &placement, |index| found.unit(index)).unwrap();
            let trained = |model: &Model| all_bits(model, |index| model.whole_trained_unit(index));
            let merged = |model: &Model| all_bits(model, |index| model.whole_unit(index));
            assert!(trained(&again) == trained(&expected) && merged(&again) == merged(&expected), "{family}");
            assert_eq!(found.parameters(), expected.trained_parameters());
        }
    }
}

#[test]
fn names_are_those_of_peft() {
    let dir = tempfile::tempdir().unwrap();
    let lora = LoraConfig { targets: vec!["q_proj".into(), "down_proj".into()], ..config(2, 0.0) };
    let folder = written("llama", &lora, 1, dir.path());
    let spec = base("llama").spec().clone();
    let (d, f) = (spec.hidden, spec.mlp_width);
    let mut expected = Vec::new();
    for layer in 0..spec.layers {
        let name =
            |map: &str, matrix: &str| format!("base_model.model.model.layers.{layer}.{map}.lora_{matrix}.weight");
        expected.push((name("mlp.down_proj", "A"), vec![2, f]));
        expected.push((name("mlp.down_proj", "B"), vec![d, 2]));
        expected.push((name("self_attn.q_proj", "A"), vec![2, d]));
        expected.push((name("self_attn.q_proj", "B"), vec![spec.heads * spec.head_dim, 2]));
    }
    assert_eq!(listed(&folder.join("adapter_model.safetensors")), expected);
    let config: Value = serde_json::from_slice(&std::fs::read(folder.join("adapter_config.json")).unwrap()).unwrap();
    for (key, value) in [
        ("peft_type", json!("LORA")),
        ("task_type", json!("CAUSAL_LM")),
        ("r", json!(2)),
        ("lora_alpha", json!(4)),
        ("target_modules", json!(["q_proj", "down_proj"])),
        ("bias", json!("none")),
        ("fan_in_fan_out", json!(false)),
        ("base_model_name_or_path", json!("some/base")),
    ] {
        assert_eq!(config[key], value, "{key}");
    }

    let dir = tempfile::tempdir().unwrap();
    let folder = written("gpt2", &config_of_all(), 1, dir.path());
    let names = listed(&folder.join("adapter_model.safetensors"));
    let first = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight";
    assert_eq!(names[0], (first.to_string(), vec![2, base("gpt2").spec().hidden]), "A has its inputs last here too");
    let config: Value = serde_json::from_slice(&std::fs::read(folder.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!(config["fan_in_fan_out"], json!(true));
    assert_eq!(config["target_modules"], json!(["c_attn", "c_fc", "c_proj"]));
}

fn config_of_all() -> LoraConfig {
    config(2, 0.0)
}

/// A scalar head that was trained along is in the folder, under the name that `peft` saves it by.
#[test]
fn a_scalar_head_goes_with_its_adapters() {
    let model = || load(&golden("llama-reward"), Head::Scalar).unwrap().into_model().unwrap().0;
    let dir = tempfile::tempdir().unwrap();
    let run = RunDir::open(dir.path()).unwrap();
    let lora = adapted(model(), &config(2, 0.0), &Placement::solo()).unwrap();
    let mut staging = run.stage_export().unwrap();
    write(&lora, "some/base", Some(&mut staging)).unwrap();
    staging.publish(json!({})).unwrap();
    let folder = run.export_path();
    let names = listed(&folder.join("adapter_model.safetensors"));
    assert!(names.iter().any(|(name, _)| name == "base_model.model.score.weight"));
    let found = read(&folder, lora.spec(), Head::Scalar).unwrap();
    let again = model().with_adapters(&found.config, &Placement::solo(), |index| found.unit(index)).unwrap();
    let merged = |model: &Model| all_bits(model, |index| model.whole_unit(index));
    assert!(merged(&again) == merged(&lora));
    let error = read(&folder, lora.spec(), Head::Language).unwrap_err().to_string();
    assert!(error.contains("task_type") && error.contains("CAUSAL_LM"), "{error}");
}

/// The model itself is exported with its adapters merged: what is read back has none and computes the same.
#[test]
fn the_model_is_exported_merged() {
    let lora = adapted(base("opt"), &config(4, 0.0), &Placement::solo()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let run = RunDir::open(dir.path()).unwrap();
    let mut staging = run.stage_export().unwrap();
    export::write(&lora, None, &ExportOptions::default(), Some(&mut staging)).unwrap();
    staging.publish(json!({})).unwrap();
    let merged = load(&run.export_path(), Head::Language).unwrap().into_model().unwrap().0;
    let weights = |model: &Model| all_bits(model, |index| model.whole_unit(index));
    assert!(weights(&merged) == weights(&lora) && weights(&lora) != weights(&lora.base()));
    let mut staging = run.stage_export().unwrap();
    let error = write(&merged, "some/base", Some(&mut staging)).unwrap_err().to_string();
    assert!(error.contains("no adapters"), "{error}");
}

/// Changes one field of the config, or takes it away, and returns what reading says.
fn refusal(folder: &Path, key: &str, value: Value) -> String {
    let path = folder.join("adapter_config.json");
    let original = std::fs::read(&path).unwrap();
    let mut config: Value = serde_json::from_slice(&original).unwrap();
    config[key] = value;
    std::fs::write(&path, config.to_string()).unwrap();
    let found = read(folder, base("llama").spec(), Head::Language);
    std::fs::write(&path, original).unwrap();
    found.expect_err(key).to_string()
}

#[test]
fn what_would_change_the_numbers_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let folder = written("llama", &config_of_all(), 1, dir.path());
    for (key, value) in [
        ("use_rslora", json!(true)),
        ("use_dora", json!(true)),
        ("modules_to_save", json!(["lm_head"])),
        ("modules_to_save", json!(["score"])),
        ("bias", json!("all")),
        ("rank_pattern", json!({ "q_proj": 8 })),
        ("alpha_pattern", json!({ "q_proj": 8 })),
        ("layers_to_transform", json!([0])),
        ("init_lora_weights", json!("pissa")),
        ("peft_type", json!("IA3")),
        ("target_modules", json!(".*q_proj")),
        ("an_option_of_later_years", json!(0.5)),
    ] {
        let error = refusal(&folder, key, value);
        assert!(error.contains(key) && error.contains("not supported"), "{key}: {error}");
    }
    for (key, value, part) in [
        ("target_modules", json!(["c_attn"]), "no linear map \"c_attn\""),
        ("r", json!("four"), "its r is not"),
        ("r", json!(0), "the rank of the adapters is 0"),
        ("lora_alpha", json!(-1), "the alpha"),
        ("lora_dropout", json!(1.0), "the dropout"),
    ] {
        let error = refusal(&folder, key, value);
        assert!(error.contains(part) && error.contains("adapter_config.json"), "{key}: {error}");
    }
    // What is off may be there, and so may what says nothing of the numbers.
    let path = folder.join("adapter_config.json");
    let mut fine: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for (key, value) in [
        ("use_qalora", json!(false)),
        ("megatron_core", json!("megatron.core")),
        ("qalora_group_size", json!(16)),
        ("loftq_config", json!({})),
        ("peft_version", json!("0.21.2")),
        ("target_modules", json!("all-linear")),
    ] {
        fine[key] = value;
    }
    std::fs::write(&path, fine.to_string()).unwrap();
    read(&folder, base("llama").spec(), Head::Language).unwrap();
}

#[test]
fn tensors_that_do_not_fit_are_all_listed() {
    let dir = tempfile::tempdir().unwrap();
    let folder = written("llama", &config_of_all(), 1, dir.path());
    // A narrower choice leaves tensors over; a wider one misses some; another rank misshapes all.
    let error = refusal(&folder, "target_modules", json!(["q_proj"]));
    let unexpected = error.lines().find(|line| line.contains("unexpected")).unwrap();
    for map in ["self_attn.k_proj.lora_A", "mlp.gate_proj.lora_B"] {
        assert_eq!(unexpected.matches(map).count(), base("llama").spec().layers, "{unexpected}");
    }
    let error = refusal(&folder, "r", json!(3));
    assert!(
        error.contains("wrong shape") && error.contains("q_proj.lora_A.weight [2, 32] instead of [3, 32]"),
        "{error}"
    );

    let dir = tempfile::tempdir().unwrap();
    let lora = LoraConfig { targets: vec!["v_proj".into()], ..config(2, 0.0) };
    let folder = written("llama", &lora, 1, dir.path());
    let error = refusal(&folder, "target_modules", json!(["v_proj", "o_proj"]));
    assert!(error.contains("missing") && error.contains("layers.0.self_attn.o_proj.lora_A"), "{error}");
}

#[test]
fn folders_that_are_none_are_refused() {
    let spec = base("llama").spec().clone();
    let dir = tempfile::tempdir().unwrap();
    let error = read(dir.path(), &spec, Head::Language).unwrap_err().to_string();
    assert!(error.contains("adapter_config.json") && error.contains("save_pretrained"), "{error}");

    let folder = written("llama", &config_of_all(), 1, dir.path());
    let weights = folder.join("adapter_model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&weights, &bytes).unwrap();
    let error = read(&folder, &spec, Head::Language).unwrap_err().to_string();
    assert!(error.contains("NaN") && error.contains("adapter_model.safetensors"), "{error}");
    std::fs::write(&weights, &bytes[..end - 1]).unwrap();
    let error = read(&folder, &spec, Head::Language).unwrap_err().to_string();
    assert!(error.contains("cut short"), "{error}");
    std::fs::remove_file(&weights).unwrap();
    let error = read(&folder, &spec, Head::Language).unwrap_err().to_string();
    assert!(error.contains("safe_serialization=True"), "{error}");
    std::fs::write(folder.join("adapter_config.json"), "[]").unwrap();
    let error = read(&folder, &spec, Head::Language).unwrap_err().to_string();
    assert!(error.contains("JSON"), "{error}");
}
