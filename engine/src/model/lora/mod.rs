//! Low-rank adapters (Hu et al., 2021, "LoRA"): a frozen linear map `W` computes with `W + (alpha / rank) · B A`, of which only
//! `A` and `B` are trained.
//!
//! Adapters are units of their own beside the units of the base: one flat buffer for each block, sliced, gathered, added up,
//! optimized, averaged and saved by the same code as weights. The base has neither gradients nor optimizer state, and nothing
//! ever writes to it, so it serves as its own reference policy ([`crate::Model::base`]).
//!
//! A training forward adds the adapters' part to the output of the frozen map. For generation and export they are added to a
//! *copy* of the weights (`merge`). The two differ by rounding: an output of a map with `k` inputs is a sum of `k` products of
//! merged weights here and of two sums there, so that they agree within about `(k + rank) · 2⁻²⁴` of the sum of the magnitudes
//! of its terms.

mod apply;
mod merge;
pub mod peft;
mod place;

use std::sync::Arc;

pub(super) use apply::{Adapted, Low};
use serde::{Deserialize, Serialize};

use super::families;
use super::names::NameTable;
use super::spec::ModelSpec;
use super::unit::{AdapterSet, AdapterSite, Head, SITES};
use crate::parallel::Weights;
use crate::{Error, Result};

/// Largest rank that is accepted: more is no longer low.
pub const RANK_LIMIT: usize = 1 << 16;

/// Which adapters a model has, and how they act.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraConfig {
    /// Rows of `A` and columns of `B`.
    pub rank: usize,
    /// Adapters are scaled by `alpha / rank`.
    pub alpha: f64,
    /// Probability of dropping an element of what an adapter reads, in training.
    pub dropout: f32,
    /// Linear maps of the blocks, by the last part of their name in the family's files (`q_proj`, `c_attn`, `fc1`, …) or by
    /// their name in a block (`mlp.c_proj`); none: all.
    pub targets: Vec<String>,
}

/// The adapters of a model: what they are, and what this rank holds of them.
#[derive(Clone, Debug)]
pub(crate) struct Adapters {
    pub(crate) config: Arc<LoraConfig>,
    pub(crate) set: Arc<AdapterSet>,
    pub(crate) weights: Weights,
}

impl LoraConfig {
    /// What the product of the two matrices is scaled by.
    pub fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }

    /// Which adapters a model of `spec` gets.
    ///
    /// # Errors
    /// [`Error::Lora`] if a number is out of range or the family has no map of a target's name.
    pub fn resolve(&self, spec: &ModelSpec, head: Head) -> Result<AdapterSet> {
        let wrong = |reason: String| Err(Error::Lora(reason));
        if self.rank == 0 || self.rank > RANK_LIMIT {
            return wrong(format!("the rank of the adapters is {}; it must be 1 to {RANK_LIMIT}", self.rank));
        }
        if !self.alpha.is_finite() || self.alpha <= 0.0 {
            return wrong(format!("the alpha of the adapters is {}; it must be a number above 0", self.alpha));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return wrong(format!("the dropout of the adapters is {}; it must be in [0, 1)", self.dropout));
        }
        let known = targets(families::names(spec.family));
        for target in &self.targets {
            if !known.iter().any(|(_, name)| matches(name, target)) {
                let names: Vec<&str> = known.iter().map(|(_, name)| last(name)).collect();
                return wrong(format!(
                    "blocks of the family {} have no linear map {target:?} to adapt; take from {}",
                    spec.family,
                    names.join(", ")
                ));
            }
        }
        let wanted = |name: &str| self.targets.is_empty() || self.targets.iter().any(|target| matches(name, target));
        let mut sites: Vec<_> = known.into_iter().filter(|(_, name)| wanted(name)).map(|(site, _)| site).collect();
        sites.sort_by_key(|site| site.number);
        Ok(AdapterSet { rank: self.rank, sites, head })
    }
}

/// Whether a target means the map called `name` in a block: as PEFT compares, by whole parts from the end.
fn matches(name: &str, target: &str) -> bool {
    name == target || name.strip_suffix(target).is_some_and(|before| before.ends_with('.'))
}

/// The last part of a map's name.
fn last(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

/// The maps that can have adapters, with their names in a block.
fn targets(names: &NameTable) -> Vec<(&'static AdapterSite, &'static str)> {
    let of_name = |&(stem, part, name): &(&'static str, _, &'static str)| {
        let here = |site: &&AdapterSite| site.weight.strip_suffix(".weight") == Some(stem) && site.part == part;
        SITES.iter().find(here).map(|site| (site, name))
    };
    names.block.iter().filter_map(of_name).collect()
}

#[cfg(test)]
mod tests {
    use super::super::families::read_spec;
    use super::*;

    fn spec(model_type: &str) -> ModelSpec {
        let config = serde_json::json!({ "model_type": model_type, "max_position_embeddings": 64 });
        read_spec(std::path::Path::new("config.json"), &config).unwrap()
    }

    fn config(targets: &[&str]) -> LoraConfig {
        let targets = targets.iter().map(ToString::to_string).collect();
        LoraConfig { rank: 4, alpha: 8.0, dropout: 0.0, targets }
    }

    fn chosen(model_type: &str, targets: &[&str]) -> Vec<&'static str> {
        let set = config(targets).resolve(&spec(model_type), Head::Language).unwrap();
        set.sites.iter().map(|site| site.a.strip_suffix(".lora_a").unwrap()).collect()
    }

    #[test]
    fn targets_are_the_families_own_names() {
        assert_eq!(chosen("llama", &[]), ["q", "k", "v", "output", "gate", "up", "down"]);
        assert_eq!(chosen("mistral", &["v_proj", "q_proj"]), ["q", "v"]);
        assert_eq!(chosen("qwen2", &["mlp.down_proj"]), ["down"]);
        assert_eq!(chosen("gpt2", &[]), ["qkv", "output", "up", "down"]);
        assert_eq!(chosen("gpt2", &["c_proj"]), ["output", "down"]);
        assert_eq!(chosen("gpt2", &["attn.c_proj"]), ["output"]);
        assert_eq!(chosen("opt", &["fc1", "fc2", "out_proj"]), ["output", "up", "down"]);
    }

    #[test]
    fn what_a_family_lacks_is_refused_with_what_it_has() {
        let error = config(&["q_proj"]).resolve(&spec("gpt2"), Head::Language).unwrap_err().to_string();
        assert!(error.contains("gpt2") && error.contains("\"q_proj\"") && error.contains("c_attn"), "{error}");
        // Parts of names, norms and the empty name are no maps.
        for target in ["proj", "input_layernorm", ""] {
            assert!(config(&[target]).resolve(&spec("llama"), Head::Language).is_err(), "{target}");
        }
        for wrong in [
            LoraConfig { rank: 0, ..config(&[]) },
            LoraConfig { alpha: f64::NAN, ..config(&[]) },
            LoraConfig { dropout: 1.0, ..config(&[]) },
        ] {
            assert!(matches!(wrong.resolve(&spec("llama"), Head::Language), Err(Error::Lora(_))));
        }
    }
}
