//! Small runs of the stages, and what they leave.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::Value;
use tandem_stages::cli::{Launch, Outcome};
use tandem_stages::config::{Config, Origin};
use tandem_stages::error::StageError;
use tandem_stages::stop::StopFlag;

/// How a stage is run: launch, its directory, the pipeline's.
pub type Stage = fn(&Launch, &Path, Option<&Path>) -> Result<Outcome, StageError>;

/// Rated sentences from a few words, so that a tiny model has something to learn.
pub fn write_data(path: &Path) {
    let (good, bad) = (["fine", "lovely", "bright", "warm"], ["dull", "weak", "cold", "grim"]);
    let mut lines = String::new();
    for i in 0..96usize {
        let (words, rating) = if i % 2 == 0 { (good, 3) } else { (bad, -3) };
        let text = format!(
            "the film number {i} is {} and {} and really {}",
            words[i % 4],
            words[(i / 4) % 4],
            words[(i / 7) % 4]
        );
        lines += &format!("{}\n", serde_json::json!({ "text": text, "rating": rating }));
    }
    fs::write(path, lines).unwrap();
}

/// A configuration of three short stages on that data.
pub fn config(data: &Path) -> Config {
    let text = format!(
        r#"
        [run]
        seed = 7
        [model.new]
        hidden = 32
        layers = 2
        heads = 4
        kv_heads = 2
        mlp_width = 48
        max_positions = 128
        [tokenizer.train]
        vocab_size = 280
        [data]
        sources = [{{ path = {data:?} }}]
        split = "1,1,1"
        eval_fraction = 0.2
        max_tokens = 96
        [sft]
        epochs = 2
        sequences_per_step = 6
        tokens_per_micro_batch = 128
        dropout = 0.1
        eval_every = 3
        checkpoint_every = 2
        optimizer.learning_rate = 1e-3
        [reward]
        pairs = {{ source = "ratings", min_gap = 2.0, per_text = 1 }}
        pairs_per_step = 4
        tokens_per_micro_batch = 192
        eval_every = 2
        checkpoint_every = 3
        optimizer.learning_rate = 1e-3
        [ppo]
        iterations = 3
        prompts_per_iteration = 6
        samples_per_prompt = 2
        epochs = 2
        mini_batches = 2
        opening_words = 3
        max_prompt_tokens = 48
        max_response_tokens = 12
        tokens_per_micro_batch = 128
        checkpoint_every = 2
        kl = {{ coefficient = 0.05, target = 1.0, horizon = 100.0 }}
        reward.rules = [{{ kind = "regex", pattern = "e" }}]
        actor_optimizer.learning_rate = 1e-3
        critic_optimizer.learning_rate = 1e-3
        [eval]
        prompts = 4
        shown = 1
        "#
    );
    Config::parse(&text, &Origin::Defaults, &[]).unwrap()
}

/// One rank.
pub fn launch(config: &Config, stop: StopFlag) -> Launch {
    Launch { stop, ..Launch::new(config.clone()) }
}

/// Everything that a run leaves and that must not depend on interruptions: exports, experience, and the log without times.
pub fn traces(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for part in ["export", "experience"] {
        collect(&dir.join(part), part, &mut found);
    }
    let log = fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    let rows = log.lines().map(|line| {
        let mut row: serde_json::Map<String, Value> = serde_json::from_str(line).unwrap();
        row.retain(|key, _| key != "t_s" && key != "tokens_per_s" && !key.starts_with("time/"));
        serde_json::to_string(&row).unwrap() + "\n"
    });
    found.insert("metrics.jsonl".into(), rows.collect::<String>().into_bytes());
    found
}

fn collect(dir: &Path, name: &str, found: &mut BTreeMap<String, Vec<u8>>) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries {
        let entry = entry.unwrap();
        let name = format!("{name}/{}", entry.file_name().to_string_lossy());
        if entry.path().is_dir() {
            collect(&entry.path(), &name, found);
        } else if !(name.ends_with("manifest.json") && name.starts_with("export")) {
            // The manifest of an export notes how long the run took.
            found.insert(name, fs::read(entry.path()).unwrap());
        }
    }
}

/// Fails if two runs have left different things, naming the first one.
pub fn assert_same(want: &BTreeMap<String, Vec<u8>>, got: &BTreeMap<String, Vec<u8>>, what: &str) {
    assert_eq!(want.keys().collect::<Vec<_>>(), got.keys().collect::<Vec<_>>(), "{what}");
    for (name, bytes) in want {
        let both =
            [bytes, &got[name]].map(|bytes| String::from_utf8_lossy(bytes).chars().take(2000).collect::<String>());
        assert!(bytes == &got[name], "{what}: {name} differs\n{}\n{}", both[0], both[1]);
    }
}
