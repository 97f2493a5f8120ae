//! Bad model files: always an error that names the file and says what is wrong, never a panic, never a model loaded loosely.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tandem_engine::Error;
use tandem_engine::model::import::load;
use tandem_engine::model::unit::Head;
use tandem_tests::golden::folder;
use tempfile::{TempDir, tempdir};

/// A copy of a golden folder that may be damaged.
fn copy(name: &str) -> (TempDir, PathBuf) {
    let root = tempdir().unwrap();
    let copy = root.path().join(name);
    fs::create_dir(&copy).unwrap();
    for entry in folder(name).read_dir().unwrap() {
        let path = entry.unwrap().path();
        if !path.ends_with("vectors.safetensors") {
            fs::copy(&path, copy.join(path.file_name().unwrap())).unwrap();
        }
    }
    (root, copy)
}

/// The message of the error that loading must end in.
fn refusal(path: &Path) -> String {
    refusal_with(path, Head::Language)
}

fn refusal_with(path: &Path, head: Head) -> String {
    match load(path, head) {
        Ok(_) => panic!("{} was loaded", path.display()),
        Err(error) => error.to_string(),
    }
}

fn assert_says(message: &str, hints: &[&str]) {
    for hint in hints {
        assert!(message.contains(hint), "{hint:?} is not in: {message}");
    }
}

fn edit_config(folder: &Path, edit: impl FnOnce(&mut Value)) {
    let path = folder.join("config.json");
    let mut config = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    edit(&mut config);
    fs::write(path, config.to_string()).unwrap();
}

/// A safetensors file of this header and these many bytes of zeros.
fn safetensors(header: &str, bytes: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.resize(file.len() + bytes, 0);
    file
}

#[test]
fn paths_that_are_no_model() {
    let root = tempdir().unwrap();
    assert_says(&refusal(&root.path().join("nowhere")), &["nowhere", "there is no such model"]);
    assert_says(&refusal(root.path()), &["no config.json"]);
    let file = root.path().join("model.safetensors");
    fs::write(&file, b"x").unwrap();
    assert_says(&refusal(&file), &["model.safetensors", "name the folder"]);
}

#[test]
fn folders_without_safetensors_say_what_to_do() {
    for (name, hints) in [
        ("pytorch_model.bin", ["pytorch_model.bin", "convert it to safetensors"]),
        ("weights.gguf", ["weights.gguf", "itself"]),
        ("notes.txt", ["model.safetensors", "get the folder's weights"]),
    ] {
        let (_root, copy) = copy("llama");
        fs::rename(copy.join("model.safetensors"), copy.join(name)).unwrap();
        assert_says(&refusal(&copy), &hints);
    }
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let (_root, copy) = copy("llama");
    let path = copy.join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    // Every place in the prefix, then throughout header and data.
    for length in (0..64).chain((64..whole.len()).step_by(997)).chain([whole.len() - 1]) {
        fs::write(&path, &whole[..length]).unwrap();
        assert_says(&refusal(&copy), &["model.safetensors"]);
    }
    let mut longer = whole.clone();
    longer.push(0);
    fs::write(&path, longer).unwrap();
    assert_says(&refusal(&copy), &["too long"]);
}

#[test]
fn a_header_with_any_byte_changed_never_panics() {
    let (_root, copy) = copy("llama-tied");
    let path = copy.join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for place in (0..header).step_by(5) {
        for bit in [1, 7] {
            let mut changed = whole.clone();
            changed[place] ^= 1 << bit;
            fs::write(&path, changed).unwrap();
            // The metadata may change without harm.
            if let Err(error) = load(&copy, Head::Language) {
                assert_says(&error.to_string(), &["llama-tied"]);
            }
        }
    }
}

#[test]
fn crafted_headers_are_refused() {
    let (_root, copy) = copy("llama");
    let path = copy.join("model.safetensors");
    let one = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"model.norm.weight":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    let many: Vec<String> =
        (0..70_000).map(|i| format!(r#""t{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#)).collect();
    let twice = r#""a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}"#;
    for (what, file) in [
        ("a header of 2^63 bytes", [&u64::MAX.to_le_bytes()[..], &[0; 100]].concat()),
        ("a header as long as the file", [&100u64.to_le_bytes()[..], &[b' '; 99]].concat()),
        ("not JSON", safetensors("{]", 0)),
        ("not an object", safetensors("[1, 2]", 0)),
        ("something after the object", safetensors("{} {}", 0)),
        ("nested without end", safetensors(&format!("{{\"a\":{}", "[".repeat(100_000)), 0)),
        ("a hole", safetensors(&one("F32", "[32]", "[4,132]"), 132)),
        ("offsets backwards", safetensors(&one("F32", "[32]", "[128,0]"), 128)),
        ("a shape that is larger", safetensors(&one("F32", "[33]", "[0,128]"), 128)),
        ("an overflowing shape", safetensors(&one("F32", "[4294967296,4294967296,32]", "[0,128]"), 128)),
        ("a negative dimension", safetensors(&one("F32", "[-32]", "[0,128]"), 128)),
        ("a rank of a thousand", safetensors(&one("U8", &json!(vec![1; 1000]).to_string(), "[0,1]"), 1)),
        ("an unknown dtype", safetensors(&one("F12", "[32]", "[0,128]"), 128)),
        ("an unknown field", safetensors(r#"{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"x":1}}"#, 0)),
        ("a name twice", safetensors(&format!("{{{twice},{twice}}}"), 0)),
        ("an unusual name", safetensors(&format!("{{{}}}", twice.replace("\"a\"", r#""a\u001b[2J""#)), 0)),
        ("too many tensors", safetensors(&format!("{{{}}}", many.join(",")), 0)),
        ("a pickle", b"PK\x03\x04 archive/data.pkl and so on, long enough to hold a length".to_vec()),
    ] {
        fs::write(&path, file).unwrap();
        let message = refusal(&copy);
        assert!(message.contains("model.safetensors") && !message.contains('\u{1b}'), "{what}: {message}");
        assert!(message.len() < 2_000, "{what}: a message of {} bytes", message.len());
    }
}

#[test]
fn all_tensors_that_do_not_fit_are_listed() {
    let (_root, copy) = copy("llama");
    edit_config(&copy, |config| {
        config["vocab_size"] = json!(98);
        config["attention_bias"] = json!(true);
        config["num_hidden_layers"] = json!(1);
    });
    let error = load(&copy, Head::Language).unwrap_err();
    let Error::Tensors { missing, unexpected, misshaped, .. } = &error else { panic!("{error}") };
    assert_eq!(missing.len(), 4, "{missing:?}");
    assert!(missing.contains(&"model.layers.0.self_attn.o_proj.bias".to_string()));
    assert_eq!(unexpected.len(), 9, "{unexpected:?}");
    assert_eq!(misshaped.len(), 2, "{misshaped:?}");
    assert_says(
        &error.to_string(),
        &["llama", "lm_head.weight [97, 32] instead of [98, 32]", "model.layers.1.mlp.up_proj"],
    );
}

#[test]
fn weights_that_are_not_finite_are_refused() {
    for value in [f32::NAN, f32::INFINITY] {
        let (_root, copy) = copy("gpt2");
        let path = copy.join("model.safetensors");
        let mut file = fs::read(&path).unwrap();
        let end = file.len();
        file[end - 4..].copy_from_slice(&value.to_le_bytes());
        fs::write(&path, file).unwrap();
        assert_says(&refusal(&copy), &["model.safetensors", "transformer.wte.weight"]);
    }
}

#[test]
fn indices_that_lead_astray_are_refused() {
    for name in [
        "../outside.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        ".hidden.safetensors",
        "model.bin",
        "C:\\x.safetensors",
        "",
    ] {
        let (_root, copy) = copy("qwen2");
        let path = copy.join("model.safetensors.index.json");
        let mut index: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        index["weight_map"]["lm_head.weight"] = json!(name);
        fs::write(&path, index.to_string()).unwrap();
        assert_says(&refusal(&copy), &["model.safetensors.index.json", "not a plain name"]);
    }
    for (shard, hints) in [
        ("model-00001-of-00003.safetensors", &["which is not so"][..]),
        ("model-00009-of-00003.safetensors", &["model-00009-of-00003.safetensors", "no such file"][..]),
    ] {
        let (_root, copy) = copy("qwen2");
        let path = copy.join("model.safetensors.index.json");
        let mut index: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        index["weight_map"]["lm_head.weight"] = json!(shard);
        fs::write(&path, index.to_string()).unwrap();
        assert_says(&refusal(&copy), hints);
    }
    let (_root, copy) = copy("qwen2");
    fs::copy(copy.join("model-00003-of-00003.safetensors"), copy.join("model-00002-of-00003.safetensors")).unwrap();
    assert_says(&refusal(&copy), &["lm_head.weight is both in"]);
    fs::remove_file(copy.join("model-00001-of-00003.safetensors")).unwrap();
    assert_says(&refusal(&copy), &["model-00001-of-00003.safetensors", "no such file"]);
}

#[test]
fn special_files_do_not_keep_the_reader_waiting() {
    let (_root, copy) = copy("llama");
    fs::remove_file(copy.join("model.safetensors")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", copy.join("model.safetensors")).unwrap();
    assert_says(&refusal(&copy), &["not a regular file"]);
    fs::remove_file(copy.join("config.json")).unwrap();
    fs::create_dir(copy.join("config.json")).unwrap();
    assert_says(&refusal(&copy), &["config.json", "not a regular file"]);
}

#[test]
fn heads_that_do_not_fit() {
    assert_says(&refusal(&folder("llama-reward")), &["llama-reward", "reward model", "name the language model"]);
    let (_root, copy) = copy("llama");
    // A folder that calls itself a classifier must have the head of one.
    edit_config(&copy, |config| config["architectures"] = json!(["LlamaForSequenceClassification"]));
    assert_says(&refusal_with(&copy, Head::Scalar), &["score.weight"]);
    edit_config(&copy, |config| {
        config["architectures"] = json!(["LlamaForCausalLM"]);
        config["tandem"] = json!({ "reward_mean": 0.5, "reward_std": 0 });
    });
    assert_says(&refusal_with(&copy, Head::Scalar), &["config.json", "reward_std"]);
}

#[test]
fn gguf_files_cut_or_changed_never_panic_through() {
    let root = tempdir().unwrap();
    let path = root.path().join("model.gguf");
    let whole = fs::read(folder("llama-gguf").join("model-q8_0.gguf")).unwrap();
    // What follows the last tensor is up to 31 bytes of padding, which nobody misses.
    for length in (0..64).chain((64..whole.len() - 32).step_by(499)).chain([whole.len() - 32]) {
        fs::write(&path, &whole[..length]).unwrap();
        assert_says(&refusal(&path), &["model.gguf"]);
    }
    for place in (0..2_500).step_by(7) {
        let mut changed = whole.clone();
        changed[place] ^= 0x41;
        fs::write(&path, changed).unwrap();
        if let Err(error) = load(&path, Head::Language) {
            assert_says(&error.to_string(), &["model.gguf"]);
        }
    }
}
