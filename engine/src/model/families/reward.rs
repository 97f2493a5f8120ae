//! Mean and spread of a reward model's scores, kept in its `config.json`.
//!
//! A reward model's scores have no natural zero and no natural unit. Whoever trained it measured both on held-out data; whoever
//! uses it subtracts the one and divides by the other.

use std::path::Path;

use serde_json::{Value, json};

use crate::{Error, Result};

/// The key of `config.json` that holds what transformers has no key for.
const KEY: &str = "tandem";

/// Mean and standard deviation of a reward model's scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RewardScale {
    /// Mean.
    pub mean: f64,
    /// Standard deviation, above zero.
    pub std: f64,
}

impl RewardScale {
    /// A score in units of standard deviations from the mean.
    pub fn apply(&self, score: f64) -> f64 {
        (score - self.mean) / self.std
    }

    /// Reads the scale from the `config.json` at `path`, if it has one.
    pub(super) fn read(path: &Path, config: &Value) -> Result<Option<Self>> {
        let own = &config[KEY];
        let number = |key: &str| own[key].as_f64().filter(|number| number.is_finite());
        if own["reward_mean"].is_null() && own["reward_std"].is_null() {
            return Ok(None);
        }
        match (number("reward_mean"), number("reward_std")) {
            (Some(mean), Some(std)) if std > 0.0 => Ok(Some(Self { mean, std })),
            _ => Err(Error::model_file(
                path,
                format!("{KEY}.reward_mean and {KEY}.reward_std must be numbers, the second above 0"),
                "correct them, or remove both",
            )),
        }
    }

    /// Puts the scale into a config, or takes out what was there.
    pub(super) fn write(scale: Option<Self>, config: &mut serde_json::Map<String, Value>) {
        match scale {
            Some(Self { mean, std }) => config.insert(KEY.into(), json!({ "reward_mean": mean, "reward_std": std })),
            None => config.remove(KEY),
        };
    }
}
