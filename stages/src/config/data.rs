//! `[data]`: which rows there are, and which stage gets which of them.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tandem_data::length::OverLong;
use tandem_data::{FieldMap, OnBadRow};

use super::check::Checker;
use super::stage::Stage;

/// `[data]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// `[[data.sources]]`: one or more files.
    pub sources: Vec<SourceConfig>,
    /// Shares of SFT, reward and PPO, like `"2,4,4"`. A row's share is decided by a hash of its content, so the stages
    /// never see each other's rows, in whatever order the files are.
    pub split: String,
    /// Share of each stage's rows that is held out for evaluation.
    pub eval_fraction: f64,
    /// Longest sequence in tokens, prompt and response together.
    pub max_tokens: usize,
    /// What to do with a longer one.
    pub over_long: OverLong,
    /// A file with a Jinja chat template, or `"none"` for plain text; left out: the model's own, if it has one.
    pub template: Option<String>,
    /// What to do with a row that cannot be read.
    pub on_bad_row: OnBadRow,
    /// With `on_bad_row = "skip"`: the largest share of bad rows to put up with.
    pub max_bad_fraction: f64,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            sources: Vec::new(),
            split: "2,4,4".to_owned(),
            eval_fraction: 0.05,
            max_tokens: 512,
            over_long: OverLong::Drop,
            template: None,
            on_bad_row: OnBadRow::Error,
            max_bad_fraction: 0.01,
        }
    }
}

/// `[[data.sources]]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceConfig {
    /// A `.jsonl`, `.json`, `.parquet` or `.arrow` file, relative to the working directory.
    pub path: PathBuf,
    /// How often its rows are drawn relative to those of the other sources; left out: by its number of rows.
    #[serde(default)]
    pub weight: Option<f64>,
    /// Which field of the rows plays which part, for example `fields = { text = "review" }`.
    #[serde(default)]
    pub fields: FieldMap,
    /// The stages that use it; left out: all. Its rows are shared out among these in the proportions of `data.split`.
    #[serde(default)]
    pub stages: Option<Vec<Stage>>,
}

impl SourceConfig {
    /// Whether `stage` gets rows of this source.
    pub fn serves(&self, stage: Stage) -> bool {
        self.stages.as_ref().is_none_or(|stages| stages.contains(&stage))
    }
}

impl DataConfig {
    /// Shares of SFT, reward and PPO. `None` if `split` is not three whole numbers with a sum above zero.
    pub fn shares(&self) -> Option<[u32; 3]> {
        let shares: Vec<u32> = self.split.split(',').map(|share| share.trim().parse().ok()).collect::<Option<_>>()?;
        let shares: [u32; 3] = shares.try_into().ok()?;
        shares.iter().any(|&share| share > 0).then_some(shares)
    }

    pub(super) fn check(&self, stages: &[Stage], check: &mut Checker) {
        if self.sources.is_empty() {
            check.fail("data.sources", "is empty; name at least one file: [[data.sources]] with path = \"…\"");
        }
        for (index, source) in self.sources.iter().enumerate() {
            if let Some(weight) = source.weight {
                check.positive(&format!("data.sources[{index}].weight"), weight);
            }
            if source.stages.as_ref().is_some_and(Vec::is_empty) {
                check.fail(
                    &format!("data.sources[{index}].stages"),
                    "is empty; leave it out to use the source everywhere",
                );
            }
        }
        match self.shares() {
            None => check.fail(
                "data.split",
                format_args!("is {:?}; it must be three whole numbers, like \"2,4,4\"", self.split),
            ),
            Some(shares) => {
                for &stage in stages {
                    if shares[stage.index()] == 0 {
                        check.fail("data.split", format_args!("is {:?}, which leaves nothing for {stage}", self.split));
                    } else if !self.sources.is_empty() && !self.sources.iter().any(|source| source.serves(stage)) {
                        check.fail("data.sources", format_args!("has no source whose `stages` include {stage}"));
                    }
                }
            }
        }
        check.below_one("data.eval_fraction", self.eval_fraction);
        check.at_least("data.max_tokens", self.max_tokens, 2);
        check.fraction("data.max_bad_fraction", self.max_bad_fraction);
    }
}
