//! A stage's run: its directory, where it resumes, its log, its checkpoints and its export.
//!
//! ```text
//! let mut run = Run::open(&dir, Stage::Sft, &config, Resume::Auto, &world)?;
//! run.pin("data", &digest)?;                              // the same data as before?
//! let mut state = match run.resume_point() { Some(point) => load(point)?, None => fresh() };
//! while state.step < steps {
//!     run.log(&train_step(&mut state)?)?;
//!     if is_due(state.step, every) { run.save(state.step, &state.counters, |staging| …)?; }
//!     if launch.should_stop(tag)? { run.save_now(state.step, …)?; return Ok(Outcome::Stopped); }
//! }
//! run.finish(&results, |staging| …)?;
//! ```

mod experience;
mod identity;
mod record;
mod save;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use clap::ValueEnum;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tandem_collective::{Collective, Tag};
use tandem_store::{Published, RunDir, StoreError};

pub use record::RunRecord;

use crate::config::{Config, ConfigError, Lanes, Origin, Stage};
use crate::error::{Result, StageError};
use crate::monitor::{MetricsLog, MetricsRow};
use crate::ranks::{LEADER, share};
use identity::{Class, differences};

/// What to do with what an earlier run has left in the output directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Resume {
    /// Continue it from its newest intact checkpoint.
    #[default]
    Auto,
    /// Set it aside and start over.
    Never,
}

impl Resume {
    /// Whether an earlier run is continued.
    pub(crate) fn is_auto(self) -> bool {
        self == Resume::Auto
    }
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

/// An open run, as one of its ranks sees it. The leader owns the directory until this is dropped; the others write nothing,
/// and read what has been published.
///
/// All ranks make the same calls in the same order, those that take `&self` alone excepted where they say so.
#[derive(Debug)]
pub struct Run {
    world: Arc<dyn Collective>,
    path: PathBuf,
    record: RunRecord,
    resume_point: Option<ResumePoint>,
    lanes: Lanes,
    keep_last: usize,
    failed_saves: u32,
    /// Names of the calls made so far, so that ranks that have come apart notice.
    calls: u64,
    hold: Hold,
}

/// What a rank has of the directory.
#[derive(Debug)]
enum Hold {
    /// The leader: all of it.
    Owner { dir: RunDir, metrics: MetricsLog },
    /// Another rank: nothing but the time.
    Follower { seconds_before: f64, start: Instant },
}

/// What the leader finds when it opens a run, for all ranks.
#[derive(Debug, Serialize, Deserialize)]
struct Opened {
    record: RunRecord,
    lanes: Lanes,
    resume_step: Option<u64>,
    seconds_before: f64,
}

impl Run {
    /// Opens `path` for `stage` and finds out where to continue. Called by all ranks of `world`.
    ///
    /// # Errors
    /// [`ConfigError::OtherPlan`] if it holds a run that this configuration cannot continue, [`ConfigError::Invalid`] if
    /// so many ranks cannot, and whatever the store refuses: a directory in use, no intact checkpoint.
    pub fn open(
        path: &Path,
        stage: Stage,
        config: &Config,
        resume: Resume,
        world: &Arc<dyn Collective>,
    ) -> Result<Self> {
        let tag = Tag::new("run/open", 0);
        let (opened, resume_point, hold) = if world.rank() == LEADER {
            let (opened, resume_point, hold) = open_as_leader(path, stage, config, resume, world.world())?;
            (share(&**world, tag, Some(opened))?, resume_point, hold)
        } else {
            let opened: Opened = share(&**world, tag, None)?;
            let resume_point = opened.resume_step.map(|step| read_checkpoint(path, step)).transpose()?;
            let hold = Hold::Follower { seconds_before: opened.seconds_before, start: Instant::now() };
            (opened, resume_point, hold)
        };
        let keep_last = match stage {
            Stage::Sft => config.sft.keep_last,
            Stage::Reward => config.reward.keep_last,
            Stage::Ppo => config.ppo.keep_last,
        };
        Ok(Self {
            world: Arc::clone(world),
            path: path.to_path_buf(),
            record: opened.record,
            resume_point,
            lanes: opened.lanes,
            keep_last,
            failed_saves: 0,
            calls: 0,
            hold,
        })
    }

    /// The run's directory.
    pub fn path(&self) -> &Path {
        &self.path
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

    /// In how many parts this run takes its sums, ever since it began.
    pub fn lanes(&self) -> Lanes {
        self.lanes
    }

    /// Notes the digest of an input when the run begins, and compares it when the run continues.
    ///
    /// # Errors
    /// [`StageError::InputChanged`] if it is not what it was, [`StageError::InputDiffers`] if it is not the leader's.
    pub fn pin(&mut self, what: &str, digest: &str) -> Result<()> {
        if let Some(before) = self.record.digests.get(what).filter(|&before| before != digest)
            && self.is_leader()
        {
            return Err(StageError::InputChanged {
                what: what.to_owned(),
                before: before.clone(),
                now: digest.to_owned(),
            });
        }
        let tag = self.next_tag("run/pin");
        let there = share(&*self.world, tag, self.is_leader().then(|| digest.to_owned()))?;
        if there != digest {
            let (rank, here) = (self.world.rank(), digest.to_owned());
            return Err(StageError::InputDiffers { what: what.to_owned(), rank, leader: LEADER, here, there });
        }
        if self.record.digests.insert(what.to_owned(), digest.to_owned()).is_none()
            && let Hold::Owner { dir, .. } = &self.hold
        {
            self.record.write(dir)?;
        }
        Ok(())
    }

    /// Seconds of running, those of earlier processes included. May be called by one rank alone.
    pub fn seconds(&self) -> f64 {
        match &self.hold {
            Hold::Owner { metrics, .. } => metrics.seconds(),
            Hold::Follower { seconds_before, start } => seconds_before + start.elapsed().as_secs_f64(),
        }
    }

    /// Appends a row to `metrics.jsonl`; of the leader's, all others are left out.
    ///
    /// # Errors
    /// An error of the file system.
    pub fn log(&mut self, row: &MetricsRow) -> Result<()> {
        match &mut self.hold {
            Hold::Owner { metrics, .. } => Ok(metrics.append(row)?),
            Hold::Follower { .. } => Ok(()),
        }
    }

    fn is_leader(&self) -> bool {
        matches!(self.hold, Hold::Owner { .. })
    }

    fn next_tag(&mut self, site: &'static str) -> Tag {
        self.calls += 1;
        Tag::new(site, self.calls)
    }
}

/// Takes the directory, and finds out what is in it and where to continue.
fn open_as_leader(
    path: &Path,
    stage: Stage,
    config: &Config,
    resume: Resume,
    ranks: usize,
) -> Result<(Opened, Option<ResumePoint>, Hold)> {
    let mesh = config.mesh(ranks, &[stage], &Origin::Defaults)?;
    let dir = RunDir::open(path)?;
    if resume == Resume::Never
        && let Some(aside) = dir.set_aside()?
    {
        tracing::info!("set the earlier run aside as {}", aside.display());
    }
    let mut lanes = config.lanes(mesh, stage);
    let mut record = RunRecord::new(stage, config)?;
    record.set_lanes(lanes);
    if let Some(before) = RunRecord::read(&dir)? {
        if let Some(kept) = before.lanes() {
            lanes = config.parallel.lanes_after(kept);
            record.set_lanes(lanes);
        }
        let changed = check_same_run(&before, &record, path)?;
        lanes.check(mesh, config.generating(stage))?;
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
    let resume_step = resume_point.as_ref().map(|point| point.step);
    let opened = Opened { record, lanes, resume_step, seconds_before: metrics.seconds() };
    Ok((opened, resume_point, Hold::Owner { dir, metrics }))
}

/// The checkpoint that the leader has found, as a rank sees it that owns nothing.
fn read_checkpoint(path: &Path, step: u64) -> Result<ResumePoint> {
    let dir = RunDir::checkpoint_path(path, step);
    let files = open_published(&dir)?;
    Ok(ResumePoint { step, files })
}

/// Opens for reading what the leader has published.
fn open_published(dir: &Path) -> Result<Published> {
    if !dir.is_dir() {
        // Most likely another machine's directory of the same name.
        let problem = "the leader has published it, but this rank does not see it; the output directory must be on a file \
                       system that all ranks share";
        return Err(StoreError::Corrupt { path: dir.to_path_buf(), problem: problem.into() }.into());
    }
    Ok(Published::open(dir)?)
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
