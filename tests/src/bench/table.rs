//! The table of the README: every kind of work, ours and, where Python is at hand, the peer's, by turns.

use std::path::PathBuf;

use clap::Args;

use super::case::{Case, Files, Format, TOKENS_PER_MICRO_BATCH, Work};
use super::peers::{Peer, libraries, variants};
use super::{BenchError, Measured, Shape, median};

/// What the table holds.
#[derive(Clone, Debug, Args)]
pub struct TableArgs {
    /// Kinds of work.
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["sft", "reward", "generate", "ppo"])]
    pub work: Vec<Work>,
    /// Models.
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["tiny", "small"])]
    pub shape: Vec<Shape>,
    /// Number formats.
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["f32", "bf16"])]
    pub precision: Vec<Format>,
    /// A Python that has PyTorch and transformers; without it only our side is measured.
    #[arg(long)]
    pub python: Option<PathBuf>,
    /// Variants of the peer; all that PyTorch has of a kind of work unless given. Other libraries have to be named.
    #[arg(long, value_delimiter = ',')]
    pub variant: Vec<String>,
    /// Times that each side is measured.
    #[arg(long, default_value_t = 3)]
    pub rounds: usize,
    /// Steps of a measurement.
    #[arg(long, default_value_t = 5)]
    pub steps: usize,
    /// What our models keep in files.
    #[arg(long, value_enum, default_value = "none")]
    pub offload: Files,
    /// Most tokens in one forward of ours.
    #[arg(long, default_value_t = TOKENS_PER_MICRO_BATCH)]
    pub tokens_per_micro_batch: usize,
}

impl TableArgs {
    /// Measures and prints, a row as soon as it is there.
    ///
    /// # Errors
    /// If a measurement fails.
    pub fn run(&self) -> Result<(), BenchError> {
        let known: Vec<&str> = self.work.iter().flat_map(|&work| [variants(work), libraries(work)].concat()).collect();
        if let Some(name) = self.variant.iter().find(|name| !known.contains(&name.as_str())) {
            return Err(format!("`--variant {name}`: the peer has {} for this work", known.join(", ")).into());
        }
        println!(
            "| work | shape | precision | tokens/s | MiB | peer | tokens/s | MiB | time, ours / peer | memory, ours / peer |"
        );
        println!("|---|---|---|---|---|---|---|---|---|---|");
        for &work in &self.work {
            for &shape in &self.shape {
                for &precision in &self.precision {
                    self.row(work, shape, precision)?;
                }
            }
        }
        Ok(())
    }

    fn row(&self, work: Work, shape: Shape, precision: Format) -> Result<(), BenchError> {
        let Self { steps, offload, tokens_per_micro_batch, .. } = *self;
        let case = Case { steps, precision, offload, tokens_per_micro_batch, ..Case::new(work, shape) };
        let precision = precision.name();
        let ours_alone = |ours: &Measured| {
            format!(
                "| {} | {} | {precision} | {:.0} | {:.0} |",
                work.name(),
                shape.name(),
                ours.tokens_per_s(),
                ours.peak_mib
            )
        };
        let Some(python) = &self.python else {
            println!("{} – | – | – | – | – |", ours_alone(&case.run_apart()?));
            return Ok(());
        };
        let peer = Peer::new(python, case.threads())?;
        let named = |variant: &&&str| self.variant.iter().any(|name| name == **variant);
        let wanted = variants(work).iter().filter(|variant| self.variant.is_empty() || named(variant));
        for variant in wanted.chain(libraries(work).iter().filter(named)) {
            let (mut rounds, mut time, mut memory) = (Vec::new(), Vec::new(), Vec::new());
            for _ in 0..self.rounds {
                let (ours, theirs) = (case.run_apart()?, peer.run(work, shape, precision, variant, self.steps)?);
                time.push(ours.median_s() / theirs.median_s());
                memory.push(ours.peak_mib / theirs.peak_mib);
                rounds.push((ours, theirs));
            }
            rounds.sort_by(|a, b| a.0.median_s().total_cmp(&b.0.median_s()));
            let (ours, theirs) = &rounds[rounds.len() / 2];
            println!(
                "{} {variant} | {:.0} | {:.0} | {:.2} | {:.2} |",
                ours_alone(ours),
                theirs.tokens_per_s(),
                theirs.peak_mib,
                median(&time),
                median(&memory)
            );
        }
        Ok(())
    }
}
