//! `[eval]` and `[export]`: how results are judged and what is handed out.

use serde::{Deserialize, Serialize};

use super::check::Checker;
use super::scoring::RuleConfig;

/// `[eval]`: the before-and-after table of PPO, and the sizes of the other evaluations.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvalConfig {
    /// Most held-out rows that an evaluation looks at.
    pub max_rows: usize,
    /// Held-out prompts that the model before and after PPO answers.
    pub prompts: usize,
    /// How many of these answers the table shows.
    pub shown: usize,
    /// `[[eval.judge]]`: rules that judge the answers; PPO never sees them. A response is positive if their sum is above 0.
    pub judge: Vec<RuleConfig>,
}

impl Default for EvalConfig {
    fn default() -> Self {
        Self { max_rows: 1000, prompts: 200, shown: 3, judge: Vec::new() }
    }
}

impl EvalConfig {
    pub(super) fn check(&self, check: &mut Checker) {
        check.at_least("eval.max_rows", self.max_rows, 1);
        check.at_least("eval.prompts", self.prompts, 1);
        for (index, rule) in self.judge.iter().enumerate() {
            rule.check(&format!("eval.judge[{index}]"), check);
        }
    }
}

/// `[export]`: the finished model, as a Hugging Face folder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ExportConfig {
    /// Element type of the weights.
    pub dtype: ExportDtype,
    /// Largest weight file, in MiB; a larger model is cut into several.
    pub max_shard_mib: u64,
}

/// Element type of exported weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExportDtype {
    /// 32-bit: exactly what was trained.
    F32,
    /// bfloat16, rounded to nearest: half the size.
    Bf16,
}

impl Default for ExportConfig {
    fn default() -> Self {
        Self { dtype: ExportDtype::F32, max_shard_mib: 4096 }
    }
}

impl ExportConfig {
    pub(super) fn check(&self, check: &mut Checker) {
        check.at_least("export.max_shard_mib", self.max_shard_mib, 1);
    }
}
