//! `run.json`: what a run directory was made with.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tandem_store::{RunDir, StoreError};

use crate::config::{Config, Lanes, Role, Stage};
use crate::error::{Result, StageError};

/// Format of `run.json`.
const FORMAT: u32 = 1;
/// Keys of `[parallel]`.
const DATA_LANES: &str = "data_lanes";
const TENSOR_LANES: &str = "tensor_lanes";

/// The contents of `run.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    /// Version of this file's layout.
    format: u32,
    /// The stage.
    pub stage: Stage,
    /// Versions of the program and the platform.
    pub versions: BTreeMap<String, String>,
    /// The seed, as in the plan.
    pub seed: u64,
    /// The sections of the configuration that the stage reads, with all defaults filled in.
    pub plan: Value,
    /// Digests of what went in: data, model, tokenizer.
    pub digests: BTreeMap<String, String>,
    /// Whether the export is published and nothing is left to do.
    pub finished: bool,
    /// What the finished stage has measured.
    pub results: Value,
}

impl RunRecord {
    /// The record of a run that begins.
    pub(super) fn new(stage: Stage, config: &Config) -> Result<Self> {
        let versions = [
            ("tandem", env!("CARGO_PKG_VERSION")),
            ("architecture", std::env::consts::ARCH),
            ("system", std::env::consts::OS),
        ];
        Ok(Self {
            format: FORMAT,
            stage,
            versions: versions.into_iter().map(|(name, version)| (name.to_owned(), version.to_owned())).collect(),
            seed: config.run.seed,
            plan: plan_of(stage, config)?,
            digests: BTreeMap::new(),
            finished: false,
            results: Value::Null,
        })
    }

    /// In how many parts the run takes its sums; `None` if that was not yet noted.
    pub(super) fn lanes(&self) -> Option<Lanes> {
        let lanes = |key: &str| usize::try_from(self.plan.get("parallel")?.get(key)?.as_u64()?).ok();
        Some(Lanes { data: lanes(DATA_LANES)?, tensor: lanes(TENSOR_LANES)? })
    }

    /// Notes in the plan what a 0 there has come to mean.
    pub(super) fn set_lanes(&mut self, lanes: Lanes) {
        if let Some(parallel) = self.plan.get_mut("parallel") {
            parallel[DATA_LANES] = lanes.data.into();
            parallel[TENSOR_LANES] = lanes.tensor.into();
        }
    }

    /// Reads the record of a run directory; `None` if there is none.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] if it is not a record of this format.
    pub(super) fn read(dir: &RunDir) -> Result<Option<Self>> {
        dir.read_run_file()?.map(|text| parse(&text, dir.root())).transpose()
    }

    pub(super) fn write(&self, dir: &RunDir) -> Result<()> {
        let text = serde_json::to_string_pretty(self).map_err(StageError::bug)?;
        Ok(dir.write_run_file(&(text + "\n"))?)
    }
}

fn parse(text: &str, root: &Path) -> Result<RunRecord> {
    let record: RunRecord = serde_json::from_str(text)
        .map_err(|error| StoreError::Corrupt { path: root.join("run.json"), problem: error.to_string() })?;
    if record.format > FORMAT {
        return Err(StoreError::NewerFormat { path: root.join("run.json"), found: record.format, known: FORMAT }.into());
    }
    Ok(record)
}

/// The sections that `stage` reads. A change elsewhere in the file is no change of this stage's run.
fn plan_of(stage: Stage, config: &Config) -> Result<Value> {
    let common =
        ["run", "model", "tokenizer", "data", "parallel", "lora", "generation", "eval", "export", stage.name()];
    let sections = common.into_iter().chain(Role::of(stage).iter().map(|role| role.section()));
    let Value::Object(mut all) = serde_json::to_value(config).map_err(StageError::bug)? else {
        return Err(StageError::bug("a configuration is a table"));
    };
    let plan: Map<String, Value> =
        sections.filter_map(|section| Some((section.to_owned(), all.remove(section)?))).collect();
    Ok(Value::Object(plan))
}
