//! `[actor]`, `[critic]`, `[reference]` and `[reward_model]`: what of each model a rank holds, and where.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tandem_engine::{Precision, WeightFormat};

use super::check::Checker;
use super::optimizer::OptimizerConfig;
use super::{Config, Stage};

/// A part that a model plays in a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// The model that `sft` and `ppo` train: `[actor]`.
    Actor,
    /// The values of PPO: `[critic]`.
    Critic,
    /// The model that the actor is held to: `[reference]`.
    Reference,
    /// The model that `reward` trains and that scores in PPO: `[reward_model]`.
    RewardModel,
}

impl Role {
    /// Its section's name.
    pub const fn section(self) -> &'static str {
        match self {
            Role::Actor => "actor",
            Role::Critic => "critic",
            Role::Reference => "reference",
            Role::RewardModel => "reward_model",
        }
    }

    /// The models of `stage`.
    pub const fn of(stage: Stage) -> &'static [Role] {
        match stage {
            Stage::Sft => &[Role::Actor],
            Stage::Reward => &[Role::RewardModel],
            Stage::Ppo => &[Role::Actor, Role::Critic, Role::Reference, Role::RewardModel],
        }
    }

    /// Whether `stage` trains it.
    pub const fn is_trained(self, stage: Stage) -> bool {
        match stage {
            Stage::Sft | Stage::Reward => true,
            Stage::Ppo => matches!(self, Role::Actor | Role::Critic),
        }
    }
}

/// One of `[actor]`, `[critic]`, `[reference]`, `[reward_model]`. Nothing but `weights` changes a result.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RoleConfig {
    /// What is sharded over the data-parallel ranks between steps (Rajbhandari et al., ZeRO, 2020): 0 nothing, 1 the
    /// optimizer's moments, 2 gradients too, 3 weights too. A model that is not trained has weights only, so only 3 makes a
    /// difference there.
    pub zero_stage: u8,
    /// What is kept in files instead of memory.
    pub offload: Offload,
    /// The folder of these files, best on a fast local disk; left out: the output directory.
    pub offload_dir: Option<PathBuf>,
    /// What the linear maps of the model are kept in while `ppo` only asks it: `"precision"`, that of the run, or `"int8"`, 8
    /// bits with a scale for each row (`[reference]` and `[reward_model]`, with `run.precision = "bf16"`).
    pub weights: WeightFormat,
}

/// What is kept in files. A process maps into memory what it works on, moments of one unit at a time or less, and lets go of
/// it after; the system keeps as much of the files in memory as is free.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Offload {
    /// Nothing.
    #[default]
    None,
    /// The moments of the optimizer, which are read and written once per step.
    Optimizer,
    /// Weights as well: slices of `zero_stage = 3`, and those of a model that is not trained, unless `weights` is `"int8"`.
    All,
}

impl RoleConfig {
    fn check(&self, section: &str, check: &mut Checker) {
        if self.zero_stage > 3 {
            check.fail(
                &format!("{section}.zero_stage"),
                format_args!("is {}; it must be 0, 1, 2 or 3", self.zero_stage),
            );
        }
        if let Some(dir) = &self.offload_dir {
            let key = format!("{section}.offload_dir");
            if dir.as_os_str().is_empty() {
                check.fail(&key, "is empty; name a folder, or leave it out");
            }
            if self.offload == Offload::None {
                check.fail(&key, "is given, but `offload` is \"none\"; set it to \"optimizer\" or \"all\"");
            }
        }
    }
}

impl Config {
    /// The section of `role`.
    pub fn role(&self, role: Role) -> &RoleConfig {
        match role {
            Role::Actor => &self.actor,
            Role::Critic => &self.critic,
            Role::Reference => &self.reference,
            Role::RewardModel => &self.reward_model,
        }
    }

    /// Checks the four sections, whichever stages are run.
    pub(super) fn check_roles(&self, check: &mut Checker) {
        for role in [Role::Actor, Role::Critic, Role::Reference, Role::RewardModel] {
            self.role(role).check(role.section(), check);
        }
    }

    /// Weights of 8 bits are those of models that nothing changes, multiplied in bf16, and whole.
    pub(super) fn check_weights(&self, check: &mut Checker) {
        let is_int8 = |role| self.role(role).weights == WeightFormat::Int8;
        for role in [Role::Actor, Role::Critic].into_iter().filter(|role| is_int8(*role)) {
            let remedy = if role == Role::Actor { "; `ppo.rollout_weights` is for what samples" } else { "" };
            let problem = format_args!("is \"int8\", but ppo trains this model; take \"precision\"{remedy}");
            check.fail(&format!("{}.weights", role.section()), problem);
        }
        for role in [Role::Reference, Role::RewardModel].into_iter().filter(|role| is_int8(*role)) {
            let (section, key) = (role.section(), format!("{}.weights", role.section()));
            self.check_int8(&key, check);
            if self.role(role).zero_stage == 3 {
                check.fail(&key, format_args!("is \"int8\", which is kept whole; set `{section}.zero_stage` to 0"));
            }
        }
        if is_int8(Role::Reference) && self.lora.is_on() {
            let problem = "is \"int8\", but with [lora] the reference is the actor's own base; take \"precision\"";
            check.fail("reference.weights", problem);
        }
        if is_int8(Role::RewardModel) && !self.ppo.reward.is_model() {
            let problem = "is \"int8\", but no reward model scores: [ppo.reward] has rules or a command; leave it out";
            check.fail("reward_model.weights", problem);
        }
        if self.ppo.rollout_weights == WeightFormat::Int8 {
            self.check_int8("ppo.rollout_weights", check);
            if self.ppo.pin_parameters {
                let problem = "keeps the copy that generates, but \"int8\" in `ppo.rollout_weights` makes it anew each time; \
                               turn one off";
                check.fail("ppo.pin_parameters", problem);
            }
        }
    }

    fn check_int8(&self, key: &str, check: &mut Checker) {
        if self.run.precision != Precision::Bf16 {
            check.fail(key, "is \"int8\", which is multiplied in bf16; set `run.precision` to \"bf16\"");
        }
    }

    /// Compressed gradients are those of whole models: what the `optimizer` in `section` needs of the model of `role`.
    pub(super) fn check_compression(
        &self,
        section: &str,
        optimizer: &OptimizerConfig,
        role: Role,
        check: &mut Checker,
    ) {
        if !optimizer.kind.is_compressed() {
            return;
        }
        let key = format!("{section}.kind");
        let zero_stage = self.role(role).zero_stage;
        if zero_stage > 1 {
            let problem = format_args!(
                "is \"{}\", which compresses whole gradients; it needs {}.zero_stage of at most 1, not {zero_stage}",
                optimizer.kind,
                role.section()
            );
            check.fail(&key, problem);
        }
        if self.parallel.tensor > 1 || self.parallel.pipeline > 1 {
            let problem = format_args!(
                "is \"{}\", which needs parallel.tensor = 1 and parallel.pipeline = 1, not {} and {}",
                optimizer.kind, self.parallel.tensor, self.parallel.pipeline
            );
            check.fail(&key, problem);
        }
    }
}
