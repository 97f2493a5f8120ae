//! Which models a stage starts from, once it is known whether the stages before it have been run in the same pipeline.

use std::path::{Path, PathBuf};

use crate::config::{Config, ConfigError, NewModelConfig, Origin, RewardSourceConfig, RuleConfig, Stage};

/// Where a model comes from.
#[derive(Debug, Clone, PartialEq)]
pub enum ModelSource {
    /// A folder, GGUF file or hub id.
    Path(String),
    /// Random weights.
    New(NewModelConfig),
}

/// What responses are worth in PPO.
#[derive(Debug, Clone, PartialEq)]
pub enum RewardSource {
    /// The folder of a reward model.
    Model(String),
    /// The weighted sum of rules.
    Rules(Vec<RuleConfig>),
    /// An external program.
    Command {
        /// The program and its arguments.
        command: Vec<String>,
        /// How long it may take for one iteration, in seconds.
        timeout_s: f64,
    },
}

/// The models of PPO.
#[derive(Debug, Clone, PartialEq)]
pub struct PpoModels {
    /// The model to be trained; also the reference.
    pub actor: String,
    /// The model whose weights the critic starts from.
    pub critic: String,
    /// What responses are worth.
    pub reward: RewardSource,
}

/// The directory of a stage in the pipeline's directory `root`.
pub fn stage_dir(root: &Path, stage: Stage) -> PathBuf {
    root.join(stage.name())
}

/// The finished model of a stage in the pipeline's directory `root`.
fn export_of(root: &Path, stage: Stage) -> String {
    stage_dir(root, stage).join("export").display().to_string()
}

impl Config {
    /// What SFT starts from.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] if there is no model.
    pub fn sft_model(&self) -> Result<ModelSource, ConfigError> {
        match (&self.model.path, &self.model.new) {
            (Some(path), _) => Ok(ModelSource::Path(path.clone())),
            (None, Some(new)) => Ok(ModelSource::New(new.clone())),
            (None, None) => Err(needed("model", "needs `model.path` or `[model.new]`")),
        }
    }

    /// What the reward model starts from; `pipeline` is the pipeline's directory, if it is run as part of one.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] if there is no model.
    pub fn reward_init(&self, pipeline: Option<&Path>) -> Result<String, ConfigError> {
        self.after_sft(&self.reward.init, pipeline).ok_or_else(|| needed("reward.init", "needs the folder of a model"))
    }

    /// What PPO starts from; `pipeline` is the pipeline's directory, if it is run as part of one.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] if there is no actor or no reward.
    pub fn ppo_models(&self, pipeline: Option<&Path>) -> Result<PpoModels, ConfigError> {
        let actor = self
            .after_sft(&self.ppo.actor, pipeline)
            .ok_or_else(|| needed("ppo.actor", "needs the folder of a model"))?;
        let RewardSourceConfig { model, rules, command, command_timeout_s, clip: _ } = &self.ppo.reward;
        let reward = match (model, rules, command, pipeline) {
            (Some(model), ..) => RewardSource::Model(model.clone()),
            (_, Some(rules), ..) => RewardSource::Rules(rules.clone()),
            (_, _, Some(command), _) => {
                RewardSource::Command { command: command.clone(), timeout_s: *command_timeout_s }
            }
            (.., Some(root)) => RewardSource::Model(export_of(root, Stage::Reward)),
            (.., None) => return Err(needed("ppo.reward", "needs `model`, `rules` or `command`")),
        };
        let critic = match (&self.ppo.critic, &reward) {
            (Some(critic), _) => critic.clone(),
            (None, RewardSource::Model(model)) => model.clone(),
            (None, _) => actor.clone(),
        };
        Ok(PpoModels { actor, critic, reward })
    }

    /// The model named, or the SFT model of the pipeline, or the one in `[model]`.
    fn after_sft(&self, named: &Option<String>, pipeline: Option<&Path>) -> Option<String> {
        named.clone().or_else(|| pipeline.map(|root| export_of(root, Stage::Sft))).or_else(|| self.model.path.clone())
    }
}

fn needed(key: &str, problem: &str) -> ConfigError {
    ConfigError::Invalid { origin: Origin::Defaults, problems: vec![format!("`{key}` {problem}")] }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Config {
        Config::parse(text, &Origin::Defaults, &[]).unwrap()
    }

    #[test]
    fn a_pipeline_hands_its_models_on() {
        let plan = config("[model]\nnew = {}");
        assert!(matches!(plan.sft_model().unwrap(), ModelSource::New(_)));
        let root = Path::new("out");
        assert_eq!(plan.reward_init(Some(root)).unwrap(), "out/sft/export");
        let models = plan.ppo_models(Some(root)).unwrap();
        assert_eq!(models.actor, "out/sft/export");
        assert_eq!(models.critic, "out/reward/export");
        assert_eq!(models.reward, RewardSource::Model("out/reward/export".into()));
    }

    #[test]
    fn a_stage_by_itself_uses_what_is_named() {
        let plan = config("[model]\npath = 'base'\n[ppo]\nreward.rules = [{ kind = 'regex', pattern = 'a' }]");
        assert_eq!(plan.sft_model().unwrap(), ModelSource::Path("base".into()));
        assert_eq!(plan.reward_init(None).unwrap(), "base");
        let models = plan.ppo_models(None).unwrap();
        assert_eq!((models.actor.as_str(), models.critic.as_str()), ("base", "base"));
        assert!(matches!(models.reward, RewardSource::Rules(_)));
        let named =
            config("[ppo]\nactor = 'a'\ncritic = 'c'\nreward.model = 'r'").ppo_models(Some(Path::new("x"))).unwrap();
        assert_eq!((named.actor.as_str(), named.critic.as_str()), ("a", "c"));
        assert_eq!(named.reward, RewardSource::Model("r".into()));
    }

    #[test]
    fn what_is_missing_is_said() {
        let empty = config("");
        assert!(empty.sft_model().unwrap_err().to_string().contains("model.path"));
        assert!(empty.reward_init(None).unwrap_err().to_string().contains("reward.init"));
        assert!(empty.ppo_models(None).unwrap_err().to_string().contains("ppo.actor"));
        let without_reward = config("[model]\npath = 'm'").ppo_models(None);
        assert!(without_reward.unwrap_err().to_string().contains("ppo.reward"));
    }
}
