//! A process that is killed without warning, again and again, still ends with the bytes of one that was left alone.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// A tiny pipeline with a checkpoint after every step.
fn write_config(dir: &Path) {
    let words = ["fine", "lovely", "bright", "warm", "dull", "weak", "cold", "grim"];
    let lines: String = (0..80usize)
        .map(|i| {
            let text = format!("film {i} is {} and {} and {}", words[i % 8], words[(i / 3) % 8], words[(i / 7) % 8]);
            format!("{}\n", serde_json::json!({ "text": text }))
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
        [sft]
        epochs = 4
        sequences_per_step = 4
        tokens_per_micro_batch = 128
        checkpoint_every = 1
        "#,
        dir.join("data.jsonl")
    );
    fs::write(dir.join("config.toml"), config).unwrap();
}

fn sft(dir: &Path, output: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sft"));
    command.arg("--config").arg(dir.join("config.toml")).arg("--output-dir").arg(dir.join(output));
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command
}

#[test]
fn a_run_killed_again_and_again_ends_with_the_same_bytes() {
    let temp = tempfile::tempdir().unwrap();
    write_config(temp.path());
    assert!(sft(temp.path(), "whole").status().unwrap().success());
    let want = fs::read(temp.path().join("whole/export/model.safetensors")).unwrap();

    // Each attempt lives half as long again as the one before; progress is kept, so one of them finishes.
    let mut kills = 0;
    let mut life = Duration::from_millis(5);
    for attempt in 1u32.. {
        let mut child = sft(temp.path(), "killed").spawn().unwrap();
        let deadline = Instant::now() + life;
        life = life.mul_f64(1.5);
        let finished = loop {
            match child.try_wait().unwrap() {
                Some(status) => break Some(status),
                None if Instant::now() >= deadline => break None,
                None => sleep(Duration::from_millis(1)),
            }
        };
        match finished {
            Some(status) => {
                assert!(status.success(), "attempt {attempt} failed: {status}");
                break;
            }
            None => {
                child.kill().unwrap();
                child.wait().unwrap();
                kills += 1;
            }
        }
    }
    assert!(kills >= 3, "only {kills} kills");
    assert!(want == fs::read(temp.path().join("killed/export/model.safetensors")).unwrap(), "after {kills} kills");
}

#[test]
fn a_second_run_in_the_same_directory_is_refused_and_touches_nothing() {
    let temp = tempfile::tempdir().unwrap();
    write_config(temp.path());
    let mut first = sft(temp.path(), "run").spawn().unwrap();
    // Wait until the first one owns the directory.
    let lock = temp.path().join("run/run.json");
    while !lock.exists() && first.try_wait().unwrap().is_none() {
        sleep(Duration::from_millis(1));
    }
    let second = sft(temp.path(), "run").status().unwrap();
    let first_was_running = first.try_wait().unwrap().is_none();
    assert!(first.wait().unwrap().success());
    if first_was_running {
        assert_eq!(second.code(), Some(6));
    }
}
