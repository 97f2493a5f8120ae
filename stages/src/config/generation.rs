//! `[generation]` and the sampling knobs that PPO shares with it.

use serde::{Deserialize, Serialize};
use tandem_kernels::sample::SamplingParams;

use super::check::Checker;
use super::error::{ConfigError, Origin};

/// How a token is chosen. The default is to sample from the model's own distribution.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SamplingConfig {
    /// Divides the logits; 0 takes the most probable token.
    pub temperature: f64,
    /// Keeps the `top_k` most probable tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the fewest most probable tokens whose probabilities reach `top_p`; 1 keeps all.
    pub top_p: f64,
    /// Keeps tokens at least `min_p` times as probable as the most probable one; 0 keeps all.
    pub min_p: f64,
    /// Divides the positive and multiplies the negative logits of tokens already present; 1 changes nothing.
    pub repetition_penalty: f64,
}

impl Default for SamplingConfig {
    fn default() -> Self {
        Self { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0 }
    }
}

impl SamplingConfig {
    /// What the sampler takes.
    pub fn params(&self) -> SamplingParams {
        SamplingParams {
            temperature: self.temperature as f32,
            top_k: self.top_k,
            top_p: self.top_p as f32,
            min_p: self.min_p as f32,
            repetition_penalty: self.repetition_penalty as f32,
        }
    }

    pub(super) fn check(&self, section: &str, check: &mut Checker) {
        let key = |name: &str| format!("{section}.{name}");
        check.not_negative(&key("temperature"), self.temperature);
        check.positive_fraction(&key("top_p"), self.top_p);
        check.fraction(&key("min_p"), self.min_p);
        check.positive(&key("repetition_penalty"), self.repetition_penalty);
    }
}

/// `[generation]`: how the finished model answers. `chat` uses it, and it is written to the export's
/// `generation_config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GenerationConfig {
    /// Most tokens in an answer.
    pub max_new_tokens: usize,
    /// `[generation.sampling]`.
    pub sampling: SamplingConfig,
}

impl Default for GenerationConfig {
    fn default() -> Self {
        Self {
            max_new_tokens: 256,
            sampling: SamplingConfig { temperature: 0.7, top_p: 0.95, ..SamplingConfig::default() },
        }
    }
}

impl GenerationConfig {
    /// The same, if everything in it is possible: for settings that come from elsewhere than a configuration.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] with all problems found.
    pub fn checked(self) -> Result<Self, ConfigError> {
        let mut check = Checker::default();
        self.check(&mut check);
        match check.into_problems() {
            problems if problems.is_empty() => Ok(self),
            problems => Err(ConfigError::Invalid { origin: Origin::Defaults, problems }),
        }
    }

    pub(super) fn check(&self, check: &mut Checker) {
        check.at_least("generation.max_new_tokens", self.max_new_tokens, 1);
        self.sampling.check("generation.sampling", check);
    }
}
