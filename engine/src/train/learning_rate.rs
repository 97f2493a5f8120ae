//! Learning rate as a pure function of the step: nothing to save, nothing to drift.

use serde::{Deserialize, Serialize};

/// Shape of the learning rate after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// Stays at its peak.
    Constant,
    /// Falls in a straight line.
    Linear,
    /// Falls along half a cosine (Loshchilov and Hutter 2017, without restarts).
    Cosine,
}

/// Learning rate by step: a linear warm-up from 0 to the peak, then [`ScheduleKind`] down to a share of the peak.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// Shape after the warm-up.
    pub kind: ScheduleKind,
    /// Highest learning rate.
    pub peak_lr: f64,
    /// Steps of the warm-up.
    pub warmup_steps: u64,
    /// Steps of the whole run; the end of the fall.
    pub total_steps: u64,
    /// Learning rate at the end, as a share of the peak.
    pub min_ratio: f64,
}

impl Schedule {
    /// Learning rate of `step`, counted from 1: the first step already moves, the last one is at the minimum.
    pub fn lr(&self, step: u64) -> f64 {
        if step <= self.warmup_steps {
            return self.peak_lr * step as f64 / self.warmup_steps.max(1) as f64;
        }
        let falling = self.total_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let done = ((step - self.warmup_steps) as f64 / falling).min(1.0);
        let ratio = match self.kind {
            ScheduleKind::Constant => return self.peak_lr,
            ScheduleKind::Linear => 1.0 - done,
            ScheduleKind::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
        };
        self.peak_lr * (self.min_ratio + (1.0 - self.min_ratio) * ratio)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(kind: ScheduleKind) -> Schedule {
        Schedule { kind, peak_lr: 2.0, warmup_steps: 4, total_steps: 12, min_ratio: 0.1 }
    }

    #[test]
    fn warm_up_rises_to_the_peak_and_the_fall_ends_at_the_minimum() {
        for kind in [ScheduleKind::Linear, ScheduleKind::Cosine] {
            let s = schedule(kind);
            assert_eq!(s.lr(1), 0.5);
            assert_eq!(s.lr(4), 2.0);
            assert!((s.lr(8) - 2.0 * 0.55).abs() < 1e-12, "half way down");
            assert!((s.lr(12) - 0.2).abs() < 1e-12);
            assert!((s.lr(100) - 0.2).abs() < 1e-12, "past the end it stays");
        }
        assert_eq!(schedule(ScheduleKind::Constant).lr(100), 2.0);
    }

    #[test]
    fn no_warm_up_starts_below_the_peak_only_by_one_step_of_the_fall() {
        let s = Schedule { warmup_steps: 0, ..schedule(ScheduleKind::Linear) };
        assert!((s.lr(12) - 0.2).abs() < 1e-12 && s.lr(1) < 2.0 && s.lr(1) > 1.8);
    }
}
