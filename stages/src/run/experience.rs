//! The rollouts of PPO: published by the leader, read by all ranks.

use serde_json::Value;
use tandem_collective::Tag;
use tandem_store::{Published, Staging};

use super::save::publish;
use super::{Hold, Run, open_published};
use crate::error::{Result, StageError};
use crate::ranks::share;

impl Run {
    /// Where the rollout of `iteration` is or will be.
    pub fn experience_path(&self, iteration: u64) -> std::path::PathBuf {
        tandem_store::RunDir::experience_path(&self.path, iteration)
    }

    /// Publishes the rollout of `iteration`, which `write` writes as in [`Self::save`].
    ///
    /// # Errors
    /// Whatever `write` or the store refuses; the others learn of the leader's failure.
    pub fn commit_experience(
        &self,
        iteration: u64,
        meta: Value,
        write: impl FnOnce(Option<&mut Staging>) -> Result<()>,
    ) -> Result<()> {
        let staging = match &self.hold {
            Hold::Owner { dir, .. } => Some(dir.experience().stage(iteration).map_err(StageError::from)),
            Hold::Follower { .. } => None,
        };
        publish(staging, meta, write)?;
        // Nobody looks for it before it is there.
        Ok(self.world.barrier(Tag::new("run/commit experience", iteration))?)
    }

    /// The rollout of `iteration`, checked; `None`, on all ranks, if there is none that is intact.
    ///
    /// # Errors
    /// An error of the file system.
    pub fn open_experience(&self, iteration: u64) -> Result<Option<Published>> {
        let tag = Tag::new("run/open experience", iteration);
        match &self.hold {
            Hold::Owner { dir, .. } => {
                let found = dir.experience().open(iteration)?;
                share(&*self.world, tag, Some(found.is_some()))?;
                Ok(found)
            }
            Hold::Follower { .. } => {
                let is_there: bool = share(&*self.world, tag, None)?;
                is_there.then(|| open_published(&self.experience_path(iteration))).transpose()
            }
        }
    }
}
