//! Which keys of a plan may change between two starts of one run.
//!
//! A resumed run must equal the uninterrupted one, so what decides its numbers is part of its identity. Two kinds of
//! keys are not: those that only say where and how it is computed, and those that people turn while a run is going on.

use serde_json::Value;

/// What a change of a key means for a run that has begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Class {
    /// No change of the results: threads, memory, how often to report and save.
    Placement,
    /// Another course from here on, on purpose: learning rate, length, KL target.
    Tunable,
    /// Another run.
    Identity,
}

/// Keys inside sections that may change which themselves may not: an optimizer of another kind has another state, a model in
/// another format says something else.
const IDENTITY_KEYS: [&str; 8] = [
    "parallel.data_lanes",
    "parallel.tensor_lanes",
    "reference.weights",
    "reward_model.weights",
    "sft.optimizer.kind",
    "reward.optimizer.kind",
    "ppo.actor_optimizer.kind",
    "ppo.critic_optimizer.kind",
];
/// Sections and keys that may change; all others are identity, so a new key is safe until someone decides otherwise.
const PLACEMENT: [&str; 15] = [
    "model.shape",
    "parallel",
    "actor",
    "critic",
    "reference",
    "reward_model",
    "eval",
    "export",
    "generation",
    "lora.export",
    "ppo.max_out_tokens",
    "ppo.inference_tp_size",
    "ppo.release_inference_cache",
    "ppo.pin_parameters",
    "ppo.tp_gather_partition_size",
];
const PLACEMENT_KEYS: [&str; 8] = [
    "threads",
    "output_dir",
    "tokens_per_micro_batch",
    "recompute",
    "eval_every",
    "checkpoint_every",
    "keep_last",
    "command_timeout_s",
];
const TUNABLE: [&str; 5] =
    ["sft.optimizer", "reward.optimizer", "ppo.actor_optimizer", "ppo.critic_optimizer", "ppo.kl"];
const TUNABLE_KEYS: [&str; 11] = [
    "lora.learning_rate",
    "sft.epochs",
    "sft.max_steps",
    "reward.epochs",
    "reward.max_steps",
    "ppo.iterations",
    "ppo.policy_clip",
    "ppo.value_clip",
    "ppo.entropy_coefficient",
    "ppo.max_approx_kl",
    "ppo.missing_eos_penalty",
];

/// The class of the key with this full path.
pub(super) fn class(key: &str) -> Class {
    let inside =
        |section: &&str| key.strip_prefix(*section).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
    let last = key.rsplit('.').next().unwrap_or(key);
    if IDENTITY_KEYS.contains(&key) {
        Class::Identity
    } else if PLACEMENT.iter().any(inside) || PLACEMENT_KEYS.contains(&last) {
        Class::Placement
    } else if TUNABLE.iter().any(inside) || TUNABLE_KEYS.contains(&key) {
        Class::Tunable
    } else {
        Class::Identity
    }
}

/// One key with different values.
#[derive(Debug, PartialEq)]
pub(super) struct Difference {
    pub(super) class: Class,
    key: String,
    before: Value,
    now: Value,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: was {}, is {}", self.key, self.before, self.now)
    }
}

/// The keys in which two plans differ, in order. A key that one of them lacks counts as `null` there.
pub(super) fn differences(before: &Value, now: &Value) -> Vec<Difference> {
    let mut found = Vec::new();
    compare("", before, now, &mut found);
    found
}

fn compare(key: &str, before: &Value, now: &Value, found: &mut Vec<Difference>) {
    if let (Value::Object(before), Value::Object(now)) = (before, now) {
        let mut names: Vec<&String> = before.keys().chain(now.keys()).collect();
        names.sort();
        names.dedup();
        for name in names {
            let inner = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
            let of = |table: &serde_json::Map<String, Value>| table.get(name).cloned().unwrap_or(Value::Null);
            compare(&inner, &of(before), &of(now), found);
        }
    } else if before != now {
        found.push(Difference { class: class(key), key: key.to_owned(), before: before.clone(), now: now.clone() });
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn classes() {
        for (key, expected) in [
            ("run.threads", Class::Placement),
            ("run.seed", Class::Identity),
            ("model.new.hidden", Class::Identity),
            ("data.sources", Class::Identity),
            ("sft.recompute", Class::Placement),
            ("sft.optimizer.learning_rate", Class::Tunable),
            ("sft.sequences_per_step", Class::Identity),
            ("ppo.kl.coefficient", Class::Tunable),
            ("ppo.iterations", Class::Tunable),
            ("ppo.reward.clip", Class::Identity),
            ("generation.max_new_tokens", Class::Placement),
            ("evaluation", Class::Identity),
            ("parallel.tensor", Class::Placement),
            ("parallel.timeout_s", Class::Placement),
            ("parallel.data_lanes", Class::Identity),
            ("parallel.tensor_lanes", Class::Identity),
            ("actor.zero_stage", Class::Placement),
            ("reward_model.offload_dir", Class::Placement),
            ("ppo.actor", Class::Identity),
            ("ppo.inference_tp_size", Class::Placement),
            ("ppo.actor_optimizer.kind", Class::Identity),
            ("ppo.actor_optimizer.freeze_steps", Class::Tunable),
            ("lora.rank", Class::Identity),
            ("lora.learning_rate", Class::Tunable),
            ("lora.export", Class::Placement),
        ] {
            assert_eq!(class(key), expected, "{key}");
        }
    }

    #[test]
    fn every_key_named_here_exists() {
        let plan = serde_json::to_value(crate::config::Config::default()).unwrap();
        let find = |path: &str| path.split('.').try_fold(&plan, |place, key| place.get(key));
        for path in PLACEMENT.iter().chain(&IDENTITY_KEYS).chain(&TUNABLE).chain(&TUNABLE_KEYS) {
            assert!(find(path).is_some(), "{path}");
        }
        let text = plan.to_string();
        for key in PLACEMENT_KEYS {
            assert!(text.contains(&format!("\"{key}\":")), "{key}");
        }
    }

    #[test]
    fn differences_have_full_paths() {
        let before = json!({ "a": { "b": 1, "c": [1, 2] }, "d": null });
        let now = json!({ "a": { "b": 2, "c": [1, 2], "e": true }, "d": null });
        let found: Vec<String> = differences(&before, &now).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["a.b: was 1, is 2", "a.e: was null, is true"]);
        assert_eq!(differences(&now, &now), []);
    }
}
