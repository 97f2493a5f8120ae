//! The configuration: one TOML file for all stages, as typed structs.
//!
//! Every section and every key has a default, so a file holds only what differs. [`Config::load`] reads the file, applies
//! `--set` arguments, and refuses what it does not know; [`Config::check`] then looks at ranges and contradictions, for
//! the stages that are to be run. After that nothing in here can fail any more.

mod build;
mod check;
mod data;
mod deserialize;
mod error;
mod eval;
mod generation;
mod load;
mod lora;
mod model;
mod optimizer;
mod overrides;
mod parallel;
mod ppo;
mod reward;
mod role;
mod run;
mod scoring;
mod sft;
mod stage;
mod training;

use serde::{Deserialize, Serialize};

pub use data::{DataConfig, SourceConfig};
pub use error::{ConfigError, Origin};
pub use eval::{EvalConfig, ExportConfig, ExportDtype};
pub use generation::{GenerationConfig, SamplingConfig};
pub use lora::{LoraConfig, LoraExport};
pub use model::{ModelConfig, NewModelConfig, ShapeConfig, TokenizerConfig, TrainTokenizerConfig};
pub use optimizer::{OptimizerConfig, OptimizerKind};
pub use parallel::{Lanes, ParallelConfig};
pub use ppo::{KlConfig, PpoConfig};
pub use reward::{PairSource, PairsConfig, RewardConfig};
pub use role::{Offload, Role, RoleConfig};
pub use run::RunConfig;
pub use scoring::{RewardSourceConfig, RuleConfig, RuleKind};
pub use sft::{SftConfig, SftLoss};
pub use stage::Stage;
pub use training::Training;

use check::Checker;

/// A whole configuration file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// `[run]`.
    pub run: RunConfig,
    /// `[model]`.
    pub model: ModelConfig,
    /// `[tokenizer]`.
    pub tokenizer: TokenizerConfig,
    /// `[data]`.
    pub data: DataConfig,
    /// `[parallel]`.
    pub parallel: ParallelConfig,
    /// `[actor]`: also the model that `sft` trains.
    pub actor: RoleConfig,
    /// `[critic]`.
    pub critic: RoleConfig,
    /// `[reference]`.
    pub reference: RoleConfig,
    /// `[reward_model]`: also the model that `reward` trains.
    pub reward_model: RoleConfig,
    /// `[lora]`.
    pub lora: LoraConfig,
    /// `[sft]`.
    pub sft: SftConfig,
    /// `[reward]`.
    pub reward: RewardConfig,
    /// `[ppo]`.
    pub ppo: PpoConfig,
    /// `[generation]`.
    pub generation: GenerationConfig,
    /// `[eval]`.
    pub eval: EvalConfig,
    /// `[export]`.
    pub export: ExportConfig,
}

impl Config {
    /// Checks every range, and what `stages` need beyond them.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] with all problems found; `origin` is where the configuration came from.
    pub fn check(&self, stages: &[Stage], origin: &Origin) -> Result<(), ConfigError> {
        let mut check = Checker::default();
        self.run.check(&mut check);
        self.model.check(stages.contains(&Stage::Sft), &mut check);
        self.tokenizer.check(&self.model, &mut check);
        self.data.check(stages, &mut check);
        self.parallel.check(&mut check);
        self.check_roles(&mut check);
        self.lora.check(&mut check);
        for stage in stages {
            match stage {
                Stage::Sft => {
                    self.sft.check(self.data.max_tokens, &mut check);
                    self.check_compression("sft.optimizer", &self.sft.optimizer, Role::Actor, &mut check);
                }
                Stage::Reward => {
                    self.reward.check(self.data.max_tokens, &mut check);
                    self.check_compression("reward.optimizer", &self.reward.optimizer, Role::RewardModel, &mut check);
                }
                Stage::Ppo => {
                    self.ppo.check(&mut check);
                    self.check_weights(&mut check);
                    self.check_compression("ppo.actor_optimizer", &self.ppo.actor_optimizer, Role::Actor, &mut check);
                    self.check_compression(
                        "ppo.critic_optimizer",
                        &self.ppo.critic_optimizer,
                        Role::Critic,
                        &mut check,
                    );
                }
            }
        }
        self.generation.check(&mut check);
        self.eval.check(&mut check);
        self.export.check(&mut check);
        let problems = check.into_problems();
        if problems.is_empty() { Ok(()) } else { Err(ConfigError::Invalid { origin: origin.clone(), problems }) }
    }
}
