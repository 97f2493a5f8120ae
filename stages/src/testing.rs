//! What the tests of several modules need: a small file of rated sentences, and a small model to learn them.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use crate::cli::Launch;
use crate::config::{Config, Origin};
use crate::stop::StopFlag;

/// Settings of a model that trains in a second.
pub(crate) const SMALL: &str = "
    [model.new]
    hidden = 32
    layers = 2
    heads = 2
    mlp_width = 64
    max_positions = 64
    [tokenizer.train]
    vocab_size = 300
    [sft]
    sequences_per_step = 8
    tokens_per_micro_batch = 64
    dropout = 0.1
    optimizer.learning_rate = 1e-2
    [reward]
    pairs.source = 'ratings'
    pairs.per_text = 2
    pairs_per_step = 8
    tokens_per_micro_batch = 64
    dropout = 0.1
    optimizer.learning_rate = 3e-3
";

/// A configuration over a file of `rows` sentences with ratings from −4 to 4, of which those above 0 are said to be good; with
/// `more` TOML. A fifth is held out; sequences have up to 64 tokens.
pub(crate) fn rated(dir: &Path, rows: usize, more: &str) -> Config {
    let path = dir.join("rated.jsonl");
    let mut text = String::new();
    for row in 0..rows {
        let rating = (row as f64 + 0.5) / rows as f64 * 8.0 - 4.0;
        let word = if rating > 0.0 { "good" } else { "bad" };
        writeln!(text, r#"{{"text":"sentence number {row} has {word} words","rating":{rating}}}"#).unwrap();
    }
    fs::write(&path, text).unwrap();
    let path = path.display();
    let toml = format!("[data]\nsources = [{{ path = '{path}' }}]\neval_fraction = 0.2\nmax_tokens = 64\n{more}");
    Config::parse(&toml, &Origin::Defaults, &[]).unwrap()
}

/// A launch that is stopped after `steps` steps, if any are given.
pub(crate) fn launch(config: &Config, steps: Option<u64>) -> Launch {
    let stop = steps.map_or_else(StopFlag::default, |steps| StopFlag::after(steps - 1));
    Launch { stop, ..Launch::new(config.clone()) }
}

/// The rows of a run's `metrics.jsonl`.
pub(crate) fn metrics(dir: &Path) -> Vec<serde_json::Value> {
    let text = fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// What a finished run has measured.
pub(crate) fn results(dir: &Path) -> serde_json::Value {
    let text = fs::read_to_string(dir.join("run.json")).unwrap();
    serde_json::from_str::<serde_json::Value>(&text).unwrap()["results"].clone()
}
