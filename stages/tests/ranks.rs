//! `--ranks`: several ranks in one process leave what one rank leaves, and fail with one voice.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

/// A tiny stage with four lanes, whatever the number of ranks.
fn write_config(dir: &Path) {
    let words = ["fine", "lovely", "bright", "warm", "dull", "weak", "cold", "grim"];
    let lines: String = (0..60usize)
        .map(|i| {
            format!("{}\n", serde_json::json!({ "text": format!("film {i} is {} and {}", words[i % 8], words[i / 8]) }))
        })
        .collect();
    fs::write(dir.join("data.jsonl"), lines).unwrap();
    let config = format!(
        r#"
        [model.new]
        hidden = 32
        layers = 2
        heads = 4
        mlp_width = 48
        max_positions = 96
        [tokenizer.train]
        vocab_size = 280
        [data]
        sources = [{{ path = {:?} }}]
        split = "1,0,0"
        max_tokens = 64
        [parallel]
        data_lanes = 4
        [sft]
        max_steps = 4
        sequences_per_step = 8
        tokens_per_micro_batch = 128
        checkpoint_every = 2
        "#,
        dir.join("data.jsonl")
    );
    fs::write(dir.join("config.toml"), config).unwrap();
}

fn sft(dir: &Path, output: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sft"));
    command.arg("--config").arg(dir.join("config.toml")).arg("--output-dir").arg(dir.join(output)).args(arguments);
    command.output().unwrap()
}

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn several_ranks_leave_what_one_leaves() {
    let temp = tempfile::tempdir().unwrap();
    write_config(temp.path());
    let one = sft(temp.path(), "one", &[]);
    assert!(one.status.success(), "{}", errors(&one));
    let two = sft(temp.path(), "two", &["--ranks", "2"]);
    assert!(two.status.success(), "{}", errors(&two));
    let model = |run: &str| fs::read(temp.path().join(run).join("export/model.safetensors")).unwrap();
    assert!(model("one") == model("two"));
    let said = String::from_utf8_lossy(&two.stdout).into_owned();
    assert_eq!(said.matches("perplexity").count(), 1, "one rank speaks: {said}");
    let rows = fs::read_to_string(temp.path().join("two/metrics.jsonl")).unwrap();
    assert_eq!(rows.lines().count(), 4);
    // Another number of ranks finds the run finished.
    let again = sft(temp.path(), "two", &["--ranks", "4"]);
    assert!(again.status.success() && errors(&again).contains("finished before"), "{}", errors(&again));
    assert_eq!(errors(&again).matches("finished before").count(), 1, "{}", errors(&again));
}

#[test]
fn what_all_ranks_stumble_over_is_said_once() {
    let temp = tempfile::tempdir().unwrap();
    write_config(temp.path());
    fs::write(temp.path().join("data.jsonl"), "{\n").unwrap();
    let output = sft(temp.path(), "run", &["--ranks", "4"]);
    assert_eq!(output.status.code(), Some(3), "{}", errors(&output));
    assert_eq!(errors(&output).matches("data.jsonl").count(), 1, "{}", errors(&output));
}

#[test]
fn a_number_of_ranks_that_does_not_come_out_even_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    write_config(temp.path());
    for (arguments, part) in [
        (&["--ranks", "3"][..], "`parallel.data_lanes` is 4"),
        (&["--ranks", "3", "--set", "parallel.tensor=2"], "start 4 ranks"),
        (&["--set", "parallel.pipeline=2"], "not 1; start 2 ranks"),
        (&["--ranks", "0"], "--ranks"),
        (&["--ranks-per-node", "2"], "--dry-run"),
        (&["--dry-run", "--ranks", "6"], "`parallel.data_lanes` is 4"),
    ] {
        let output = sft(temp.path(), "run", arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", errors(&output));
        assert!(errors(&output).contains(part), "{arguments:?}: {}", errors(&output));
    }
    assert!(!temp.path().join("run").exists());
}
