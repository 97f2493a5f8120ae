//! `metrics.jsonl`: one row per step. The field names are a contract that scripts rely on.

use std::time::Instant;

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use serde_json::Value;
use tandem_store::{RowLog, StoreError};

use crate::config::Stage;

/// The names of the fields, beside `stage`, `step` and `t_s` (seconds of running, interruptions not counted), which
/// every row has.
pub mod field {
    /// Mean loss per token (SFT), per pair (reward) or of the policy (PPO).
    pub const LOSS: &str = "loss";
    /// Learning rate of the step; of the actor in PPO.
    pub const LR: &str = "lr";
    /// Global norm of the gradient before clipping; of the actor in PPO.
    pub const GRAD_NORM: &str = "grad_norm";
    /// Tokens that went through the model in this step.
    pub const TOKENS: &str = "tokens";
    /// The same per second.
    pub const TOKENS_PER_S: &str = "tokens_per_s";
    /// Perplexity on held-out rows.
    pub const EVAL_PPL: &str = "eval/ppl";
    /// Share of held-out pairs whose chosen response scores higher.
    pub const EVAL_ACCURACY: &str = "eval/accuracy";
    /// Mean score of the responses.
    pub const REWARD_MEAN: &str = "reward/mean";
    /// Standard deviation of the scores.
    pub const REWARD_STD: &str = "reward/std";
    /// Mean over the responses of the sum over their tokens of `log π − log π_ref`, in nats.
    pub const KL_MEAN: &str = "kl/mean";
    /// The KL coefficient in force.
    pub const KL_COEFFICIENT: &str = "kl/coefficient";
    /// Mean entropy of the policy per response token, in nats.
    pub const ENTROPY: &str = "entropy";
    /// Share of tokens whose policy gradient was cut by the clip.
    pub const CLIP_FRACTION: &str = "clip_fraction";
    /// Largest ratio of new to old probability.
    pub const RATIO_MAX: &str = "ratio/max";
    /// Estimate of the KL divergence from the rollout's policy, in nats per token.
    pub const APPROX_KL: &str = "approx_kl";
    /// Loss of the critic.
    pub const VALUE_LOSS: &str = "value/loss";
    /// Mean length of the responses in tokens.
    pub const RESPONSE_LEN_MEAN: &str = "response/len_mean";
    /// Share of the responses that ended by themselves.
    pub const RESPONSE_EOS_RATE: &str = "response/eos_rate";
    /// Largest difference between a log-probability recorded while sampling and the one computed in training.
    pub const LOGP_GAP_MAX: &str = "logp_gap/max";
    /// The mean of these differences, where a copy in another format than the actor's has sampled.
    pub const LOGP_GAP_MEAN: &str = "logp_gap/mean";
    /// Seconds spent generating.
    pub const TIME_GENERATE_S: &str = "time/generate_s";
    /// Seconds spent scoring: rewards, reference, values.
    pub const TIME_SCORE_S: &str = "time/score_s";
    /// Seconds spent training.
    pub const TIME_TRAIN_S: &str = "time/train_s";
    /// Bytes that the leader sent to other ranks in the step, for gradients, moments and weights.
    pub const WIRE_BYTES: &str = "wire_bytes";
}

/// The measurements of one step, in the order in which they were set.
#[derive(Debug, Clone, PartialEq)]
pub struct MetricsRow {
    step: u64,
    values: Vec<(&'static str, Value)>,
}

impl MetricsRow {
    /// A row for `step`.
    pub fn new(step: u64) -> Self {
        Self { step, values: Vec::new() }
    }

    /// The step.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Sets a field to a number, text or truth value. A number that is not finite is written as `null`, since JSON has
    /// no word for it.
    pub fn set(&mut self, field: &'static str, value: impl Into<Value>) -> &mut Self {
        let value = value.into();
        match self.values.iter_mut().find(|(name, _)| *name == field) {
            Some((_, old)) => *old = value,
            None => self.values.push((field, value)),
        }
        self
    }

    /// [`Self::set`] if there is a value.
    pub fn set_some(&mut self, field: &'static str, value: Option<impl Into<Value>>) -> &mut Self {
        if let Some(value) = value {
            self.set(field, value);
        }
        self
    }

    /// The number in a field.
    pub fn get(&self, field: &str) -> Option<f64> {
        self.values.iter().find(|(name, _)| *name == field)?.1.as_f64()
    }
}

/// A row with what the log adds to it.
struct Stamped<'a> {
    stage: Stage,
    seconds: f64,
    row: &'a MetricsRow,
}

impl Serialize for Stamped<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("stage", self.stage.name())?;
        map.serialize_entry("step", &self.row.step)?;
        map.serialize_entry("t_s", &self.seconds)?;
        for (name, value) in &self.row.values {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

/// The log of one stage.
#[derive(Debug)]
pub struct MetricsLog {
    rows: RowLog,
    stage: Stage,
    last_step: Option<u64>,
    /// `t_s` of the last row before this process.
    seconds_before: f64,
    start: Instant,
}

impl MetricsLog {
    /// Continues `rows`; the clock goes on from the last row kept.
    pub fn new(rows: RowLog, stage: Stage) -> Self {
        let last = |name: &str| rows.last_row().and_then(|row| row.get(name).cloned());
        let last_step = last("step").and_then(|step| step.as_u64());
        let seconds_before = last("t_s").and_then(|seconds| seconds.as_f64()).unwrap_or(0.0);
        Self { rows, stage, last_step, seconds_before, start: Instant::now() }
    }

    /// Seconds of running, those of earlier processes included.
    pub fn seconds(&self) -> f64 {
        self.seconds_before + self.start.elapsed().as_secs_f64()
    }

    /// The step of the last row.
    pub fn last_step(&self) -> Option<u64> {
        self.last_step
    }

    /// Appends a row.
    ///
    /// # Errors
    /// An error of the file system.
    pub fn append(&mut self, row: &MetricsRow) -> Result<(), StoreError> {
        // Milliseconds are enough, and keep the rows readable.
        let seconds = (self.seconds() * 1e3).round() / 1e3;
        self.rows.append(&Stamped { stage: self.stage, seconds, row })?;
        self.last_step = Some(row.step);
        Ok(())
    }

    /// Returns once all rows are on the device.
    ///
    /// # Errors
    /// An error of the file system.
    pub fn sync(&self) -> Result<(), StoreError> {
        self.rows.sync()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_have_the_contract_fields_first_and_the_clock_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut log = MetricsLog::new(RowLog::open(&path, None).unwrap(), Stage::Sft);
        let mut row = MetricsRow::new(1);
        row.set(field::LOSS, 2.5)
            .set(field::TOKENS, 64u64)
            .set(field::LOSS, 2.25)
            .set_some(field::EVAL_PPL, None::<f64>);
        log.append(&row).unwrap();
        assert_eq!(row.get(field::LOSS), Some(2.25));
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("{\"stage\":\"sft\",\"step\":1,\"t_s\":"), "{text}");
        assert!(text.ends_with(",\"loss\":2.25,\"tokens\":64}\n"), "{text}");

        std::fs::write(&path, "{\"stage\":\"sft\",\"step\":1,\"t_s\":100.0}\n").unwrap();
        let log = MetricsLog::new(RowLog::open(&path, Some(1)).unwrap(), Stage::Sft);
        assert_eq!(log.last_step(), Some(1));
        assert!(log.seconds() >= 100.0);
    }

    #[test]
    fn what_is_not_finite_is_null() {
        let mut row = MetricsRow::new(1);
        row.set(field::LOSS, f64::NAN);
        let text = serde_json::to_string(&Stamped { stage: Stage::Ppo, seconds: 0.0, row: &row }).unwrap();
        assert!(text.ends_with("\"loss\":null}"), "{text}");
    }
}
