//! `[run]`: what holds for a run as a whole.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tandem_engine::Precision;

use super::check::Checker;

/// `[run]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RunConfig {
    /// Every random number follows from it: initial weights, data order, dropout, sampling.
    pub seed: u64,
    /// What models compute in: `"f32"`, or `"bf16"`, which takes half the memory for activations and is several times as fast on
    /// processors with instructions for it. Weights that are trained, gradients and optimizer stay in f32.
    pub precision: Precision,
    /// Threads to compute with; left out: one per core. Results do not depend on it.
    pub threads: Option<usize>,
    /// Where everything is written; `--output-dir` overrides it.
    pub output_dir: PathBuf,
}

impl Default for RunConfig {
    fn default() -> Self {
        Self { seed: 0, precision: Precision::F32, threads: None, output_dir: PathBuf::from("runs/default") }
    }
}

impl RunConfig {
    pub(super) fn check(&self, check: &mut Checker) {
        // TOML's integers end there; a larger seed could not be written back.
        if i64::try_from(self.seed).is_err() {
            check.fail("run.seed", format_args!("is {}; it must be below 2^63", self.seed));
        }
        check.optional_count("run.threads", self.threads);
        if self.output_dir.as_os_str().is_empty() {
            check.fail("run.output_dir", "is empty; name a directory");
        }
    }
}
