//! Model names.

use std::path::Path;

use tandem_data::hub::{RepoId, resolve_model_in};

fn touch(path: &Path) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, "{}").unwrap();
}

fn error(name: &str, cache: &Path) -> String {
    resolve_model_in(name, cache).unwrap_err().to_string()
}

#[test]
fn folders_and_gguf_files_are_taken_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    touch(&root.join("hf/model.safetensors"));
    touch(&root.join("one/a.gguf"));
    let resolve = |name: &str| resolve_model_in(root.join(name).to_str().unwrap(), root).unwrap();
    assert_eq!(resolve("hf"), root.join("hf"));
    assert_eq!(resolve("one"), root.join("one/a.gguf"));
    assert_eq!(resolve("one/a.gguf"), root.join("one/a.gguf"));
}

#[test]
fn unusable_folders_say_why() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let name = |name: &str| root.join(name).to_str().unwrap().to_owned();
    touch(&root.join("pickle/pytorch_model.bin"));
    assert!(error(&name("pickle"), root).contains("convert them to safetensors"));
    touch(&root.join("many/a.gguf"));
    touch(&root.join("many/b.gguf"));
    assert!(error(&name("many"), root).contains("2 .gguf files"));
    touch(&root.join("other/notes.txt"));
    assert!(error(&name("other"), root).contains("no .safetensors file (it has: notes.txt)"));
    assert!(error(&name("other/notes.txt"), root).contains("not a .gguf"));
    assert!(error(&name("othr"), root).contains("does not exist"));
}

#[test]
fn ids_follow_the_hubs_rules() {
    for good in
        ["gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct", "a/b_c.d@v1.0", "o/n@0123456789abcdef0123456789abcdef01234567"]
    {
        RepoId::parse(good).unwrap();
    }
    let long = "a".repeat(97);
    for bad in [
        "",
        "a/b/c",
        "/a",
        "a/",
        "../x",
        "a/..",
        "foo--bar",
        "a/x.git",
        "-a/b",
        "a/b.",
        "a b",
        "a/b@refs/heads",
        "a@..",
        "ü/b",
        &long,
    ] {
        assert!(RepoId::parse(bad).is_err(), "{bad:?}");
    }
    assert_eq!(RepoId::parse("owner/name").unwrap().cache_name(), "models--owner--name");
}

#[test]
fn the_shared_cache_is_used_if_it_is_complete() {
    let folder = tempfile::tempdir().unwrap();
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let repository = folder.path().join("models--owner--name");
    let snapshot = repository.join("snapshots").join(commit);
    touch(&snapshot.join("config.json"));
    touch(&snapshot.join("tokenizer.json"));
    std::fs::create_dir_all(repository.join("refs")).unwrap();
    std::fs::write(repository.join("refs/main"), commit).unwrap();
    touch(&snapshot.join("model-00001-of-00002.safetensors"));
    touch(&snapshot.join("model-00002-of-00002.safetensors"));
    let index = r#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}"#;
    std::fs::write(snapshot.join("model.safetensors.index.json"), index).unwrap();
    assert_eq!(resolve_model_in("owner/name", folder.path()).unwrap(), snapshot);
    assert_eq!(resolve_model_in(&format!("owner/name@{commit}"), folder.path()).unwrap(), snapshot);
}

#[test]
fn a_mistyped_path_is_not_looked_up_on_the_hub() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["./model", "/no/such/model", "models/llama/7b", "model.gguf"] {
        assert!(error(name, folder.path()).contains("does not exist"), "{name}");
    }
    assert!(error("owner/na me", folder.path()).contains("nor a hub id"));
}
