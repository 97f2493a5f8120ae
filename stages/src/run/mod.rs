//! A stage's run: its directory, where it resumes, its log, its checkpoints and its export.
//!
//! ```text
//! let mut run = Run::open(&dir, Stage::Sft, &config, Resume::Auto)?;
//! run.pin("data", &digest)?;                              // the same data as before?
//! let mut state = match run.resume_point() { Some(point) => load(point)?, None => fresh() };
//! while state.step < steps {
//!     run.log(&train_step(&mut state)?)?;
//!     if is_due(state.step, every) { run.save(state.step, &state.counters, |staging| …)?; }
//!     if stop.is_requested() { run.save_now(state.step, …)?; return Ok(Outcome::Stopped); }
//! }
//! run.finish(&results, |staging| …)?;
//! ```

mod identity;
mod record;

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tandem_store::{Published, RunDir, Series, Staging, StoreError};

pub use record::RunRecord;

use crate::config::{Config, ConfigError, Stage};
use crate::error::{Result, StageError};
use crate::monitor::{MetricsLog, MetricsRow};
use identity::{Class, differences};

/// After so many failures in a row to write a checkpoint the run ends.
const MAX_FAILED_SAVES: u32 = 3;

/// What to do with what an earlier run has left in the output directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Resume {
    /// Continue it from its newest intact checkpoint.
    #[default]
    Auto,
    /// Set it aside and start over.
    Never,
}

/// A checkpoint to continue from.
#[derive(Debug)]
pub struct ResumePoint {
    /// The step after which it was taken.
    pub step: u64,
    /// Its files, checked.
    pub files: Published,
}

impl ResumePoint {
    /// The counters that were saved with it.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] if they have another shape.
    pub fn state<T: DeserializeOwned>(&self) -> Result<T> {
        let meta: CheckpointMeta = self.files.meta_as()?;
        T::deserialize(meta.state).map_err(|error| {
            let problem = format!("its counters are not those of this stage: {error}");
            StoreError::Corrupt { path: self.files.dir().to_path_buf(), problem }.into()
        })
    }
}

/// What stands beside the files in a checkpoint's manifest.
#[derive(Debug, Serialize, Deserialize)]
struct CheckpointMeta {
    /// Step of the last row of `metrics.jsonl` at that time; the rows after it are made again.
    last_row: Option<u64>,
    /// The stage's counters.
    state: Value,
}

/// An open run. It owns its directory until it is dropped.
#[derive(Debug)]
pub struct Run {
    dir: RunDir,
    record: RunRecord,
    metrics: MetricsLog,
    resume_point: Option<ResumePoint>,
    keep_last: usize,
    failed_saves: u32,
}

impl Run {
    /// Opens `path` for `stage` and finds out where to continue.
    ///
    /// # Errors
    /// [`ConfigError::OtherPlan`] if it holds a run that this configuration cannot continue, and whatever the store
    /// refuses: a directory in use, no intact checkpoint.
    pub fn open(path: &Path, stage: Stage, config: &Config, resume: Resume) -> Result<Self> {
        let dir = RunDir::open(path)?;
        if resume == Resume::Never
            && let Some(aside) = dir.set_aside()?
        {
            tracing::info!("set the earlier run aside as {}", aside.display());
        }
        let mut record = RunRecord::new(stage, config)?;
        if let Some(before) = RunRecord::read(&dir)? {
            let changed = check_same_run(&before, &record, path)?;
            record.digests = before.digests;
            record.results = before.results;
            // A finished run whose course was changed has something left to do.
            record.finished = before.finished && !changed && dir.export_path().is_dir();
        }
        let resume_point = dir.checkpoints().newest_valid()?.map(|(step, files)| ResumePoint { step, files });
        let last_row = match &resume_point {
            Some(point) => point.files.meta_as::<CheckpointMeta>()?.last_row,
            None => None,
        };
        let metrics = MetricsLog::new(dir.open_metrics(last_row)?, stage);
        record.write(&dir)?;
        if let Some(point) = &resume_point {
            tracing::info!("{stage}: continuing after step {}", point.step);
        }
        let keep_last = match stage {
            Stage::Sft => config.sft.keep_last,
            Stage::Reward => config.reward.keep_last,
            Stage::Ppo => config.ppo.keep_last,
        };
        Ok(Self { dir, record, metrics, resume_point, keep_last, failed_saves: 0 })
    }

    /// Whether an earlier process has finished this very run; then there is nothing to do.
    pub fn is_finished(&self) -> bool {
        self.record.finished
    }

    /// What `run.json` says.
    pub fn record(&self) -> &RunRecord {
        &self.record
    }

    /// The checkpoint to continue from; `None` at the beginning.
    pub fn resume_point(&self) -> Option<&ResumePoint> {
        self.resume_point.as_ref()
    }

    /// Notes the digest of an input when the run begins, and compares it when the run continues.
    ///
    /// # Errors
    /// [`StageError::InputChanged`] if it is not what it was.
    pub fn pin(&mut self, what: &str, digest: &str) -> Result<()> {
        match self.record.digests.get(what) {
            Some(before) if before == digest => Ok(()),
            Some(before) => {
                Err(StageError::InputChanged { what: what.to_owned(), before: before.clone(), now: digest.to_owned() })
            }
            None => {
                self.record.digests.insert(what.to_owned(), digest.to_owned());
                self.record.write(&self.dir)
            }
        }
    }

    /// The rollouts of PPO.
    pub fn experience(&self) -> Series {
        self.dir.experience()
    }

    /// Seconds of running, those of earlier processes included.
    pub fn seconds(&self) -> f64 {
        self.metrics.seconds()
    }

    /// Appends a row to `metrics.jsonl`.
    ///
    /// # Errors
    /// An error of the file system.
    pub fn log(&mut self, row: &MetricsRow) -> Result<()> {
        Ok(self.metrics.append(row)?)
    }

    /// Saves a checkpoint after `step`: `write` writes its files, `state` are the counters to be found again. The run
    /// goes on without it if the disk is full or fails, twice; the earlier checkpoints are untouched then.
    ///
    /// # Errors
    /// Whatever `write` or the store refuses otherwise, and the third failure of the disk in a row.
    pub fn save<T: Serialize>(
        &mut self,
        step: u64,
        state: &T,
        write: impl FnOnce(&mut Staging) -> Result<()>,
    ) -> Result<()> {
        match self.save_now(step, state, write) {
            Err(error) if error.is_retryable() && self.failed_saves + 1 < MAX_FAILED_SAVES => {
                self.failed_saves += 1;
                tracing::warn!("no checkpoint after step {step}, trying again at the next one: {error}");
                Ok(())
            }
            outcome => outcome,
        }
    }

    /// As [`Self::save`], for a checkpoint without which the run must not end.
    ///
    /// # Errors
    /// Whatever `write` or the store refuses.
    pub fn save_now<T: Serialize>(
        &mut self,
        step: u64,
        state: &T,
        write: impl FnOnce(&mut Staging) -> Result<()>,
    ) -> Result<()> {
        // The rows first: no row of a published step may be missing.
        self.metrics.sync()?;
        let meta = CheckpointMeta {
            last_row: self.metrics.last_step(),
            state: serde_json::to_value(state).map_err(StageError::bug)?,
        };
        let mut staging = self.dir.checkpoints().stage(step)?;
        write(&mut staging)?;
        staging.publish(serde_json::to_value(meta).map_err(StageError::bug)?)?;
        self.failed_saves = 0;
        Ok(self.dir.checkpoints().retain(self.keep_last)?)
    }

    /// Publishes the finished model, which `write` writes, and notes that nothing is left to do. Returns the folder.
    ///
    /// # Errors
    /// Whatever `write` or the store refuses.
    pub fn finish<T: Serialize>(
        &mut self,
        results: &T,
        write: impl FnOnce(&mut Staging) -> Result<()>,
    ) -> Result<PathBuf> {
        self.metrics.sync()?;
        let results = serde_json::to_value(results).map_err(StageError::bug)?;
        let mut staging = self.dir.stage_export()?;
        write(&mut staging)?;
        let meta = serde_json::json!({ "stage": self.record.stage, "results": results });
        let published = staging.publish(meta)?;
        self.record.results = results;
        self.record.finished = true;
        self.record.write(&self.dir)?;
        Ok(published.dir().to_path_buf())
    }
}

/// Whether a checkpoint is due after `step`; `every` = 0: never.
pub fn is_due(step: u64, every: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}

/// Refuses to continue another run; otherwise says whether its course was changed.
fn check_same_run(before: &RunRecord, now: &RunRecord, path: &Path) -> Result<bool> {
    let other_plan = |differences| ConfigError::OtherPlan { dir: path.to_path_buf(), differences };
    if before.stage != now.stage {
        return Err(other_plan(vec![format!("stage: was {}, is {}", before.stage, now.stage)]).into());
    }
    let changed = differences(&before.plan, &now.plan);
    let (identity, rest): (Vec<_>, Vec<_>) = changed.iter().partition(|one| one.class == Class::Identity);
    if !identity.is_empty() {
        return Err(other_plan(identity.iter().map(ToString::to_string).collect()).into());
    }
    let tuned: Vec<_> = rest.iter().filter(|one| one.class == Class::Tunable).collect();
    for one in &tuned {
        tracing::warn!("changed since this run began: {one}");
    }
    Ok(!tuned.is_empty())
}
