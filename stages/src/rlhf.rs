//! All three stages in a row: what is finished is skipped, what is not is resumed.

use std::fs;
use std::path::Path;

use tandem_store::StoreError;

use crate::cli::{Launch, Outcome};
use crate::config::Stage;
use crate::error::{Result, StageError};
use crate::monitor::Table;
use crate::plan::stage_dir;
use crate::ppo::report::Comparison;
use crate::run::RunRecord;
use crate::{ppo, reward, sft};

/// Runs the stages in `sft`, `reward` and `ppo` under the output directory; each starts from the exports of those before it.
///
/// # Errors
/// What can end a stage, with the file, key or row concerned.
pub fn run(launch: &Launch) -> Result<Outcome> {
    let root = &launch.config.run.output_dir;
    for stage in Stage::ALL {
        let dir = stage_dir(root, stage);
        // A finished stage says so and returns at once.
        let outcome = launch.profiled(|| match stage {
            Stage::Sft => sft::run(launch, &dir, Some(root)),
            Stage::Reward => reward::run(launch, &dir, Some(root)),
            Stage::Ppo => ppo::run(launch, &dir, Some(root)),
        })?;
        if outcome == Outcome::Stopped {
            return Ok(outcome);
        }
    }
    if !launch.dry_run && launch.is_leader() {
        launch.say(summary(root)?);
    }
    Ok(Outcome::Finished)
}

/// What the finished stages under `root` have measured.
fn summary(root: &Path) -> Result<String> {
    let records: Vec<RunRecord> =
        Stage::ALL.iter().map(|&stage| read_record(&stage_dir(root, stage))).collect::<Result<_>>()?;
    let number = |stage: Stage, name: &str| records[stage.index()].results[name].as_f64();
    let mut table = Table::new(["on held-out data", "", "compare with"]);
    if let Some(perplexity) = number(Stage::Sft, "eval/ppl") {
        let unigram = number(Stage::Sft, "eval/unigram_ppl");
        let unigram = unigram.map_or_else(String::new, |unigram| format!("{unigram:.1} of word counts alone"));
        table.row(["sft: perplexity", &format!("{perplexity:.1}"), &unigram]);
    }
    if let Some(accuracy) = number(Stage::Reward, "eval/accuracy") {
        let accuracy = format!("{:.1} %", accuracy * 100.0);
        table.row(["reward: pairs ranked as people did", &accuracy, "50.0 % of guessing"]);
    }
    let comparison = records[Stage::Ppo.index()].results.as_object().and_then(Comparison::from_results);
    let mut text = format!("\n{table}\n");
    if let Some(comparison) = comparison {
        text += &format!("{comparison}\n");
    }
    let model = stage_dir(root, Stage::Ppo).join("export");
    Ok(text + &format!("talk to the result: chat {}", model.display()))
}

fn read_record(dir: &Path) -> Result<RunRecord> {
    let path = dir.join("run.json");
    let corrupt = |problem: String| StageError::from(StoreError::Corrupt { path: path.clone(), problem });
    let text = fs::read_to_string(&path).map_err(|error| corrupt(error.to_string()))?;
    serde_json::from_str(&text).map_err(|error| corrupt(error.to_string()))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn write(root: &Path, stage: Stage, results: Value) {
        let dir = stage_dir(root, stage);
        fs::create_dir_all(&dir).unwrap();
        let record = json!({
            "format": 1, "stage": stage, "versions": {}, "seed": 0, "plan": {}, "digests": {}, "finished": true,
            "results": results,
        });
        fs::write(dir.join("run.json"), record.to_string()).unwrap();
    }

    #[test]
    fn the_summary_has_a_line_for_each_stage() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), Stage::Sft, json!({ "eval/ppl": 117.04, "eval/unigram_ppl": 620.0 }));
        write(root.path(), Stage::Reward, json!({ "eval/accuracy": 0.784 }));
        write(root.path(), Stage::Ppo, json!({}));
        let text = summary(root.path()).unwrap();
        for part in ["117.0", "620.0", "78.4 %", "ppo/export"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        fs::write(root.path().join("ppo/run.json"), "{").unwrap();
        assert!(summary(root.path()).unwrap_err().to_string().contains("run.json"));
    }
}
