//! What it costs to keep the model in slices: ZeRO-3 against ZeRO-0 and, where Python is at hand, against the peers' sharding,
//! by turns.

use std::path::PathBuf;

use clap::Args;

use super::case::{Case, Format, Work};
use super::peers::Peer;
use super::{BenchError, Measured, Shape, median};

/// The libraries that `tests/peers/sharded.py` measures.
const LIBRARIES: [&str; 2] = ["fsdp2", "deepspeed"];

/// What is compared.
#[derive(Clone, Debug, Args)]
pub struct ZeroArgs {
    /// The model.
    #[arg(long, value_enum, default_value = "smollm")]
    pub shape: Shape,
    /// What it computes in.
    #[arg(long, value_enum, default_value = "f32")]
    pub precision: Format,
    /// Ranks.
    #[arg(long, default_value_t = 2)]
    pub ranks: usize,
    /// A Python that has PyTorch, transformers and DeepSpeed; without it only our stages are compared.
    #[arg(long)]
    pub python: Option<PathBuf>,
    /// Libraries of that Python.
    #[arg(long, value_delimiter = ',', default_values = LIBRARIES)]
    pub library: Vec<String>,
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
        let precision = self.precision.name();
        println!(
            "sft step of {} in {precision} on {} ranks, {} tokens",
            self.shape.name(),
            self.ranks,
            sequences * length
        );
        let case = |zero_stage| Case {
            ranks: self.ranks,
            precision: self.precision,
            zero_stage,
            steps: self.steps,
            warmup: 1,
            ..Case::new(Work::Sft, self.shape)
        };
        let peer = self.python.as_ref().map(|python| Peer::new(python, case(0).threads())).transpose()?;
        let libraries = if peer.is_some() { self.library.as_slice() } else { &[] };
        let others: Vec<_> = std::iter::once("ZeRO-0").chain(libraries.iter().map(String::as_str)).collect();
        let mut ratios = vec![(Vec::new(), Vec::new()); others.len()];
        let side = |name: &str, measured: &Measured| {
            format!("{name} {:.3} s, {:.0} MiB", measured.median_s(), measured.peak_mib)
        };
        for round in 1..=self.rounds {
            let sliced = case(3).run_apart()?;
            let mut line = format!("round {round}: {}", side("ZeRO-3", &sliced));
            for (other, (time, memory)) in others.iter().zip(&mut ratios) {
                let measured = match &peer {
                    Some(peer) if *other != "ZeRO-0" => {
                        peer.run_sharded(other, self.shape, precision, self.ranks, self.steps)?
                    }
                    _ => case(0).run_apart()?,
                };
                time.push(sliced.median_s() / measured.median_s());
                memory.push(sliced.peak_mib / measured.peak_mib);
                line = format!("{line}; {}", side(other, &measured));
            }
            println!("{line}");
        }
        for (other, (time, memory)) in others.iter().zip(&ratios) {
            println!("ZeRO-3 / {other}: time {:.3}, memory {:.3} (medians)", median(time), median(memory));
        }
        Ok(())
    }
}
