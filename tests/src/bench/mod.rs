//! Whole steps, measured: what a user waits for and how much memory it takes.
//!
//! A *case* is one kind of work on one shape. Each is measured in a process of its own, so that its peak memory is its own, and
//! comparisons run the two sides by turns, because machines are noisy: only ratios of one sitting mean anything.

mod case;
mod generate;
mod peers;
mod ppo;
mod shape;
mod table;
mod train;
mod zero;

use std::time::Instant;

use serde::{Deserialize, Serialize};
use tandem_kernels::profile;

pub use case::{Case, Files, Format, Work};
pub use shape::Shape;
pub use table::TableArgs;
pub use zero::ZeroArgs;

/// Whatever ends a measurement.
pub type BenchError = Box<dyn std::error::Error + Send + Sync>;

/// What was measured of one case.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Measured {
    /// Seconds of each step.
    pub seconds: Vec<f64>,
    /// Tokens of a step: all that go through the model, or, where there is sampling alone, the new ones.
    pub tokens: usize,
    /// Peak resident memory of the process, MiB.
    pub peak_mib: f64,
    /// Seconds of parts of a step, medians.
    #[serde(default)]
    pub phases: Vec<(String, f64)>,
}

impl Measured {
    /// Median seconds of a step.
    pub fn median_s(&self) -> f64 {
        median(&self.seconds)
    }

    /// Tokens a second at the median.
    pub fn tokens_per_s(&self) -> f64 {
        self.tokens as f64 / self.median_s()
    }
}

/// The middle one; of two in the middle their mean. NaN of none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        len if len % 2 == 1 => sorted[middle],
        _ => (sorted[middle - 1] + sorted[middle]) / 2.0,
    }
}

/// Forgets what was counted of the model's making and of the steps that warm up: a profile is of the measured steps alone.
fn warmed_up() {
    profile::take();
}

/// Runs `step` `warmup + steps` times and returns the seconds of the last `steps`.
fn timed(
    warmup: usize,
    steps: usize,
    mut step: impl FnMut(usize) -> Result<(), BenchError>,
) -> Result<Vec<f64>, BenchError> {
    let mut seconds = Vec::with_capacity(steps);
    for index in 0..warmup + steps {
        if index == warmup {
            warmed_up();
        }
        let start = Instant::now();
        step(index)?;
        if index >= warmup {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    Ok(seconds)
}

/// Peak resident memory of this process so far, MiB; 0 where the system does not say.
fn peak_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next()).and_then(|number| number.parse::<f64>().ok());
    kib.unwrap_or(0.0) / 1024.0
}

/// Numbers that look random and are the same everywhere: `index` of stream `stream`.
fn scrambled(stream: u64, index: u64) -> u64 {
    // SplitMix64 (Steele et al., 2014).
    let mut z = (stream << 40).wrapping_add(index).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// `length` token ids, none of them special.
fn tokens(stream: u64, length: usize, vocabulary: usize) -> Vec<u32> {
    (0..length as u64).map(|index| 3 + (scrambled(stream, index) % (vocabulary as u64 - 3)) as u32).collect()
}

/// `count` lengths from `least` to `most`; the first is `most`.
fn lengths(stream: u64, count: usize, least: usize, most: usize) -> Vec<usize> {
    let span = (most - least + 1) as u64;
    let length = |index| least + (scrambled(stream, index) % span) as usize;
    (0..count as u64).map(|index| if index == 0 { most } else { length(index) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn tokens_are_ordinary_and_lengths_stay_in_their_range() {
        assert!(tokens(1, 1000, 100).iter().all(|&id| (3..100).contains(&id)));
        let lengths = lengths(2, 100, 64, 128);
        assert!(lengths[0] == 128 && lengths.iter().all(|length| (64..=128).contains(length)));
        assert!(lengths.iter().any(|&length| length < 80));
    }
}
