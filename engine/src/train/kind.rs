//! Which optimizer, and what ranks exchange for it in which step.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::parallel::{Placement, Reduction, ZeroStage};
use crate::{Error, Result};

/// How the gradients of several ranks become one update.
///
/// All but [`Self::AdamW`] send about one bit for each parameter, both ways, instead of four bytes. They train with ZeRO
/// stage 0 or 1 and without tensor or pipeline parallelism. Every rank needs whole moments to apply what was exchanged, so
/// stage 1 keeps what stage 0 keeps. Their results depend on the number of ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerKind {
    /// AdamW (Loshchilov and Hutter, ICLR 2019) on the exact sum of the gradients.
    #[default]
    #[serde(rename = "adamw")]
    AdamW,
    /// 1-bit Adam (Tang et al., ICML 2021): Adam without bias correction on exact sums, then signs of the momentum with error
    /// feedback over a second moment that no longer changes.
    OneBitAdam {
        /// Steps after which the second moment stays as it is; at least 1.
        freeze_steps: u64,
    },
    /// 0/1 Adam (Lu et al., ICLR 2023): signs of the gradient between ever rarer exact sums, then steps that a rank makes by
    /// itself between exchanges of signs of what they have come to.
    ZeroOneAdam {
        /// Steps after which the second moment stays as it is and ranks make steps by themselves; at least 1.
        freeze_steps: u64,
        /// The interval between exact sums, 1 at first, doubles after so many of them; at least 1.
        variance_updates_per_interval: u64,
        /// The interval between exchanges, 1 at first, doubles after so many steps; at least 1.
        steps_per_local_interval: u64,
        /// Longest interval between exchanges; at least 1.
        max_local_steps: u64,
    },
    /// Signum with majority vote (Bernstein et al., ICLR 2019): each rank votes with the signs of its own momentum.
    SignSgd {
        /// Whether a rank adds to its next vote what its sign has left out, as EF-SignSGD (Karimireddy et al., ICML 2019).
        error_feedback: bool,
    },
}

impl fmt::Display for OptimizerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AdamW => "adamw",
            Self::OneBitAdam { .. } => "one_bit_adam",
            Self::ZeroOneAdam { .. } => "zero_one_adam",
            Self::SignSgd { .. } => "sign_sgd",
        })
    }
}

impl OptimizerKind {
    /// Whether ranks exchange less than their gradients.
    pub fn is_compressed(self) -> bool {
        self != Self::AdamW
    }

    /// Where the numbers are kept if `placement` is asked for: every rank keeps all of them for the kinds that compress.
    ///
    /// # Errors
    /// [`Error::Optimizer`] if the kind cannot train so, or its knobs make no sense.
    pub fn placed(self, placement: Placement) -> Result<Placement> {
        let refuse = |reason: String| Err(Error::Optimizer { kind: self, reason });
        let at_least_one = match self {
            Self::AdamW => return Ok(placement),
            Self::OneBitAdam { freeze_steps } => vec![("freeze_steps", freeze_steps)],
            Self::ZeroOneAdam {
                freeze_steps,
                variance_updates_per_interval,
                steps_per_local_interval,
                max_local_steps,
            } => vec![
                ("freeze_steps", freeze_steps),
                ("variance_updates_per_interval", variance_updates_per_interval),
                ("steps_per_local_interval", steps_per_local_interval),
                ("max_local_steps", max_local_steps),
            ],
            Self::SignSgd { .. } => Vec::new(),
        };
        if let Some((name, _)) = at_least_one.into_iter().find(|(_, value)| *value == 0) {
            return refuse(format!("{name} must be at least 1"));
        }
        let mesh = placement.parallel.mesh;
        if mesh.tensor > 1 || mesh.pipeline > 1 {
            return refuse(format!(
                "it works without tensor and pipeline parallelism, here tensor = {} and pipeline = {}; set both to 1 or take \
                 \"adamw\"",
                mesh.tensor, mesh.pipeline
            ));
        }
        if placement.stage > ZeroStage::One {
            return refuse(format!(
                "it works with ZeRO stage 0 or 1, not {}; lower zero_stage or take \"adamw\"",
                u8::from(placement.stage)
            ));
        }
        Ok(Placement { stage: ZeroStage::Zero, ..placement })
    }

    /// What becomes of gradients in step `step`, counted from 1: the same on all ranks, for it depends on nothing else.
    pub(crate) fn reduction(self, step: u64) -> Reduction {
        let exact = match self {
            Self::AdamW => true,
            Self::OneBitAdam { freeze_steps } => step <= freeze_steps,
            Self::ZeroOneAdam { freeze_steps, variance_updates_per_interval, .. } => {
                step <= freeze_steps && updates_variance(step, variance_updates_per_interval)
            }
            Self::SignSgd { .. } => false,
        };
        if exact { Reduction::Every } else { Reduction::Never }
    }
}

/// Whether 0/1 Adam updates its second moment in step `step`, counted from 1.
///
/// Steps that the interval divides update it; after `per_interval` updates the interval doubles.
fn updates_variance(step: u64, per_interval: u64) -> bool {
    let (mut interval, mut after) = (1_u64, 0_u64);
    loop {
        // The updates at this interval are its multiples past `after`, `per_interval` of them.
        let last = (after / interval).saturating_add(per_interval).saturating_mul(interval);
        if step <= last || interval > u64::MAX / 2 {
            return step.is_multiple_of(interval);
        }
        (after, interval) = (last, 2 * interval);
    }
}

/// Whether ranks of 0/1 Adam exchange what they have come to in step `step`, past the freeze after `freeze_steps`.
///
/// Steps that the interval divides do; the interval doubles every `per_interval` steps, up to `longest`.
pub(super) fn joins_ranks(step: u64, freeze_steps: u64, per_interval: u64, longest: u64) -> bool {
    let doublings = (step - freeze_steps - 1) / per_interval;
    let interval = u32::try_from(doublings).ok().and_then(|doublings| 1_u64.checked_shl(doublings)).unwrap_or(longest);
    step.is_multiple_of(interval.min(longest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exact_sums_become_rarer_as_in_the_reference() {
        for per_interval in [1, 2, 3, 16] {
            // DeepSpeed's own counters.
            let (mut interval, mut count) = (1, 0);
            for step in 1..5000 {
                let updates = step % interval == 0;
                assert_eq!(updates_variance(step, per_interval), updates, "step {step} of {per_interval}");
                if updates {
                    count += 1;
                    if count == per_interval {
                        (count, interval) = (0, 2 * interval);
                    }
                }
            }
        }
        assert!(!updates_variance(u64::MAX, 1));
        assert!(updates_variance(u64::MAX, u64::MAX));
    }

    #[test]
    fn exchanges_become_rarer_up_to_the_longest_interval() {
        for (freeze, per_interval, longest) in [(3, 4, 5), (10, 1, 16), (7, 100, 1)] {
            let (mut interval, mut count) = (1, 0);
            for step in freeze + 1..3000 {
                assert_eq!(joins_ranks(step, freeze, per_interval, longest), step % interval == 0, "step {step}");
                count += 1;
                if count == per_interval {
                    (count, interval) = (0, longest.min(2 * interval));
                }
            }
        }
    }

    #[test]
    fn knobs_are_written_as_they_are_called() {
        let json = serde_json::to_string(&OptimizerKind::OneBitAdam { freeze_steps: 3 }).unwrap();
        assert_eq!(json, r#"{"one_bit_adam":{"freeze_steps":3}}"#);
        assert_eq!(serde_json::to_string(&OptimizerKind::AdamW).unwrap(), r#""adamw""#);
    }
}
