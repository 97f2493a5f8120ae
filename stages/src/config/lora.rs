//! `[lora]`: low-rank adapters (Hu et al., LoRA, 2021) in place of training all weights.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::check::Checker;
use super::optimizer::OptimizerConfig;

/// `[lora]`: for the model that `sft` and `reward` train and for the actor of `ppo`; its critic is trained whole. A linear map
/// `W` becomes `W + (alpha / rank) · B A`, of which only `A` and `B` are trained. The reference of such an actor is its own
/// `W`, without a second copy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoraConfig {
    /// Rows of `A` and columns of `B`; 0: no adapters, all weights are trained.
    pub rank: usize,
    /// The adapters are scaled by `alpha / rank`.
    pub alpha: f64,
    /// Probability of dropping an element of what an adapter reads.
    pub dropout: f64,
    /// Linear maps that get an adapter, named as in PEFT: `"q_proj"`, `"down_proj"`, …; empty: all in the blocks.
    pub targets: Vec<String>,
    /// The highest learning rate of adapters, in place of the stage's own; left out: the stage's. Adapters usually take ten
    /// times that of whole weights.
    pub learning_rate: Option<f64>,
    /// The folder of a PEFT adapter to start from.
    pub adapter: Option<PathBuf>,
    /// What is handed out in the end.
    pub export: LoraExport,
}

/// What is handed out of a model with adapters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoraExport {
    /// The model with its adapters added to its weights.
    #[default]
    Merged,
    /// That, and the adapters by themselves: a PEFT folder `adapter` beside the model's `export`.
    Both,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            rank: 0,
            alpha: 16.0,
            dropout: 0.0,
            targets: Vec::new(),
            learning_rate: None,
            adapter: None,
            export: LoraExport::default(),
        }
    }
}

impl LoraConfig {
    /// Whether there are adapters.
    pub fn is_on(&self) -> bool {
        self.rank > 0
    }

    /// The optimizer of what is trained, where the stage says `whole` for whole weights.
    pub fn optimizer(&self, whole: &OptimizerConfig) -> OptimizerConfig {
        match self.learning_rate {
            Some(learning_rate) if self.is_on() => OptimizerConfig { learning_rate, ..whole.clone() },
            _ => whole.clone(),
        }
    }

    pub(super) fn check(&self, check: &mut Checker) {
        /// More is no longer low.
        const MAX_RANK: usize = 1 << 16;
        if self.rank > MAX_RANK {
            check.fail("lora.rank", format_args!("is {}; it must be at most {MAX_RANK}", self.rank));
        }
        check.positive("lora.alpha", self.alpha);
        check.below_one("lora.dropout", self.dropout);
        for (index, target) in self.targets.iter().enumerate() {
            if target.is_empty() {
                check.fail(&format!("lora.targets[{index}]"), "is empty; name a linear map, like \"q_proj\"");
            } else if self.targets[..index].contains(target) {
                check.fail(&format!("lora.targets[{index}]"), format_args!("is {target:?} once more"));
            }
        }
        if let Some(learning_rate) = self.learning_rate {
            check.positive("lora.learning_rate", learning_rate);
        }
        if let Some(adapter) = &self.adapter {
            if adapter.as_os_str().is_empty() {
                check.fail("lora.adapter", "is empty; name the folder of an adapter, or leave it out");
            } else if !self.is_on() {
                check.fail("lora.adapter", "is given, but `lora.rank` is 0; set it to the rank of the adapter");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_have_their_own_learning_rate() {
        let whole = OptimizerConfig { weight_decay: 0.5, ..OptimizerConfig::default() };
        let off = LoraConfig { learning_rate: Some(1.0), ..LoraConfig::default() };
        assert_eq!(off.optimizer(&whole), whole);
        let on = LoraConfig { rank: 4, ..off };
        assert_eq!(on.optimizer(&whole), OptimizerConfig { learning_rate: 1.0, ..whole.clone() });
        assert_eq!(LoraConfig { learning_rate: None, ..on }.optimizer(&whole), whole);
    }
}
