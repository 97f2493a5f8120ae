//! The three stages, in their order.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A stage of the pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Supervised fine-tuning.
    Sft,
    /// Reward modelling.
    Reward,
    /// Proximal policy optimisation.
    Ppo,
}

impl Stage {
    /// All stages, in the order in which the pipeline runs them.
    pub const ALL: [Stage; 3] = [Stage::Sft, Stage::Reward, Stage::Ppo];

    /// Its name in configurations, metrics and directories.
    pub const fn name(self) -> &'static str {
        match self {
            Stage::Sft => "sft",
            Stage::Reward => "reward",
            Stage::Ppo => "ppo",
        }
    }

    /// Its place in [`Self::ALL`], which is also its phase in the split of the data.
    pub const fn index(self) -> usize {
        match self {
            Stage::Sft => 0,
            Stage::Reward => 1,
            Stage::Ppo => 2,
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
