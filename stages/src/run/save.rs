//! Checkpoints and the export: made by all ranks, written by the leader, and found good or bad by all alike.

use std::path::PathBuf;

use serde::Serialize;
use serde_json::Value;
use tandem_collective::{Error as CollectiveError, Status, Tag};
use tandem_store::{Published, Staging};

use super::{CheckpointMeta, Hold, Run};
use crate::error::{Result, StageError};
use crate::ranks::LEADER;

/// After so many failures in a row to write a checkpoint the run ends.
const MAX_FAILED_SAVES: u32 = 3;

impl Run {
    /// Saves a checkpoint after `step`: `write` writes its files, `state` are the counters to be found again. The run
    /// goes on without it if the disk is full or fails, twice; the earlier checkpoints are untouched then.
    ///
    /// `write` is called on all ranks, so that it may gather what each of them has; the leader alone gets somewhere to write
    /// to, and `None` as well if that could not be had. It must go through the same gathering on all ranks, whatever the
    /// disk says in between; what the disk has said is then returned.
    ///
    /// # Errors
    /// Whatever `write` or the store refuses otherwise, and the third failure of the disk in a row; on all ranks.
    pub fn save<T: Serialize>(
        &mut self,
        step: u64,
        state: &T,
        write: impl FnOnce(Option<&mut Staging>) -> Result<()>,
    ) -> Result<()> {
        match self.try_save(step, state, write)? {
            Attempt::Done => Ok(()),
            Attempt::Failed(error) if self.failed_saves + 1 < MAX_FAILED_SAVES => {
                self.failed_saves += 1;
                if self.is_leader() {
                    tracing::warn!("no checkpoint after step {step}, trying again at the next one: {error}");
                }
                Ok(())
            }
            Attempt::Failed(error) => Err(error),
        }
    }

    /// As [`Self::save`], for a checkpoint without which the run must not end.
    ///
    /// # Errors
    /// Whatever `write` or the store refuses; on all ranks.
    pub fn save_now<T: Serialize>(
        &mut self,
        step: u64,
        state: &T,
        write: impl FnOnce(Option<&mut Staging>) -> Result<()>,
    ) -> Result<()> {
        match self.try_save(step, state, write)? {
            Attempt::Done => Ok(()),
            Attempt::Failed(error) => Err(error),
        }
    }

    /// Publishes the finished model, which `write` writes as in [`Self::save`], and notes that nothing is left to do. Returns
    /// the folder.
    ///
    /// # Errors
    /// Whatever `write` or the store refuses; on all ranks.
    pub fn finish<T: Serialize>(
        &mut self,
        results: &T,
        write: impl FnOnce(Option<&mut Staging>) -> Result<()>,
    ) -> Result<PathBuf> {
        let results = serde_json::to_value(results).map_err(StageError::bug)?;
        let meta = serde_json::json!({ "stage": self.record.stage, "results": results });
        let staging = match &self.hold {
            Hold::Owner { dir, metrics } => Some(metrics.sync().and_then(|()| dir.stage_export())),
            Hold::Follower { .. } => None,
        };
        let published = publish(staging.map(|staging| staging.map_err(StageError::from)), meta, write);
        let mut record = self.record.clone();
        record.results = results;
        record.finished = true;
        let outcome = match (published, &self.hold) {
            (Ok(Some(_)), Hold::Owner { dir, .. }) => record.write(dir),
            (published, _) => published.map(drop),
        };
        let tag = self.next_tag("run/finish");
        match self.settle(tag, outcome)? {
            Attempt::Done => self.record = record,
            Attempt::Failed(error) => return Err(error),
        }
        Ok(self.path.join("export"))
    }

    /// Publishes the adapters of the finished model, which `write` writes as in [`Self::save`].
    ///
    /// # Errors
    /// Whatever `write` or the store refuses; the others learn of the leader's failure.
    pub fn publish_adapter(&mut self, write: impl FnOnce(Option<&mut Staging>) -> Result<()>) -> Result<()> {
        let staging = match &self.hold {
            Hold::Owner { dir, .. } => Some(dir.stage_adapter().map_err(StageError::from)),
            Hold::Follower { .. } => None,
        };
        let outcome = publish(staging, serde_json::json!({ "stage": self.record.stage }), write).map(drop);
        let tag = self.next_tag("run/publish adapter");
        match self.settle(tag, outcome)? {
            Attempt::Done => Ok(()),
            Attempt::Failed(error) => Err(error),
        }
    }

    fn try_save<T: Serialize>(
        &mut self,
        step: u64,
        state: &T,
        write: impl FnOnce(Option<&mut Staging>) -> Result<()>,
    ) -> Result<Attempt> {
        let state = serde_json::to_value(state).map_err(StageError::bug)?;
        let mut last_row = None;
        let staging = match &self.hold {
            Hold::Owner { dir, metrics } => {
                last_row = metrics.last_step();
                // The rows first: no row of a published step may be missing.
                Some(metrics.sync().and_then(|()| dir.checkpoints().stage(step)))
            }
            Hold::Follower { .. } => None,
        };
        let meta = serde_json::to_value(CheckpointMeta { last_row, state }).map_err(StageError::bug)?;
        let published = publish(staging.map(|staging| staging.map_err(StageError::from)), meta, write);
        let outcome = match (published, &self.hold) {
            (Ok(Some(_)), Hold::Owner { dir, .. }) => {
                dir.checkpoints().retain(self.keep_last).map_err(StageError::from)
            }
            (published, _) => published.map(drop),
        };
        let tag = self.next_tag("run/save");
        let attempt = self.settle(tag, outcome)?;
        if matches!(attempt, Attempt::Done) {
            self.failed_saves = 0;
        }
        Ok(attempt)
    }

    /// Makes the leader's outcome that of all ranks: a failure that is worth another try is told; any other one ends this
    /// rank, which the others learn of while they wait here.
    fn settle(&self, tag: Tag, outcome: Result<()>) -> Result<Attempt> {
        let failed = match outcome {
            Ok(()) => None,
            Err(error) if error.is_retryable() && self.is_leader() => Some(error),
            Err(error) => return Err(error),
        };
        let status = if failed.is_some() { Status::SkipStep } else { Status::Healthy };
        let agreed = self.world.agree(tag, status)?;
        Ok(match (failed, agreed) {
            (Some(error), _) => Attempt::Failed(error),
            (None, Status::Healthy) => Attempt::Done,
            (None, _) => {
                let why = "it could not write to the output directory".to_owned();
                let error = CollectiveError::PeerFailed { rank: self.world.rank(), peer: LEADER, why };
                Attempt::Failed(error.into())
            }
        })
    }
}

/// How an attempt to write ended, on all ranks alike.
enum Attempt {
    Done,
    /// The disk has failed; the same files may be written some other time.
    Failed(StageError),
}

/// Lets `write` do its part whether or not there is somewhere to write to, and publishes what it has written there.
pub(super) fn publish(
    staging: Option<Result<Staging>>,
    meta: Value,
    write: impl FnOnce(Option<&mut Staging>) -> Result<()>,
) -> Result<Option<Published>> {
    match staging {
        Some(Ok(mut staging)) => {
            write(Some(&mut staging))?;
            Ok(Some(staging.publish(meta)?))
        }
        Some(Err(error)) => {
            // The other ranks count on this one's part.
            write(None)?;
            Err(error)
        }
        None => write(None).map(|()| None),
    }
}
