//! What it costs to keep the model in slices: ZeRO-3 against ZeRO-0, by turns.

use clap::Args;

use super::case::{Case, Work};
use super::{BenchError, Measured, Shape, median};

/// What is compared.
#[derive(Clone, Debug, Args)]
pub struct ZeroArgs {
    /// The model.
    #[arg(long, value_enum, default_value = "smollm")]
    pub shape: Shape,
    /// Ranks.
    #[arg(long, default_value_t = 2)]
    pub ranks: usize,
    /// Times that each side is measured.
    #[arg(long, default_value_t = 3)]
    pub rounds: usize,
    /// Steps of a measurement.
    #[arg(long, default_value_t = 3)]
    pub steps: usize,
}

impl ZeroArgs {
    /// Measures and prints.
    ///
    /// # Errors
    /// If a measurement fails.
    pub fn run(&self) -> Result<(), BenchError> {
        let (sequences, length) = self.shape.training_work();
        println!("sft step of {} on {} ranks, {} tokens", self.shape.name(), self.ranks, sequences * length);
        let case = |zero_stage| Case {
            ranks: self.ranks,
            zero_stage,
            steps: self.steps,
            warmup: 1,
            ..Case::new(Work::Sft, self.shape)
        };
        let (mut ratios, mut memory) = (Vec::new(), Vec::new());
        for round in 1..=self.rounds {
            let [whole, sliced] = [case(0).run_apart()?, case(3).run_apart()?];
            ratios.push(sliced.median_s() / whole.median_s());
            memory.push(sliced.peak_mib / whole.peak_mib);
            let side = |measured: &Measured| format!("{:.3} s, {:.0} MiB", measured.median_s(), measured.peak_mib);
            println!("round {round}: ZeRO-0 {}; ZeRO-3 {}", side(&whole), side(&sliced));
        }
        println!("ZeRO-3 / ZeRO-0: time {:.3}, memory {:.3} (medians)", median(&ratios), median(&memory));
        Ok(())
    }
}
