//! One case: its settings, and how it is run here or in a child process.

use std::process::Command;
use std::time::Duration;

use clap::{Args, ValueEnum};
use tandem_engine::parallel::{Offload, Placement};
use tandem_engine::{Precision, WeightFormat};
use tandem_kernels::profile;
use tandem_stages::monitor::breakdown;

use super::{BenchError, Measured, Shape, generate, ppo, train};

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Work {
    /// A step of supervised fine-tuning.
    Sft,
    /// A step of reward modelling, on pairs of unequal length.
    Reward,
    /// Sampling 16 × 128 tokens after prompts of 64 to 128.
    Generate,
    /// A PPO iteration: sampling, scores, an update of actor and critic.
    Ppo,
}

impl Work {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Work::Sft => "sft",
            Work::Reward => "reward",
            Work::Generate => "generate",
            Work::Ppo => "ppo",
        }
    }
}

/// A number format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// 32-bit floating point.
    F32,
    /// Its upper half.
    Bf16,
}

impl Format {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Format::F32 => "f32",
            Format::Bf16 => "bf16",
        }
    }

    /// For the engine.
    pub fn precision(self) -> Precision {
        match self {
            Format::F32 => Precision::F32,
            Format::Bf16 => Precision::Bf16,
        }
    }
}

/// What is kept in files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Files {
    /// Nothing.
    None,
    /// The moments of the optimizer.
    Optimizer,
    /// Those, and the weights of models that are not trained.
    All,
}

impl Files {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Files::None => "none",
            Files::Optimizer => "optimizer",
            Files::All => "all",
        }
    }

    fn offload(self) -> Offload {
        match self {
            Files::None => Offload::None,
            Files::Optimizer => Offload::Optimizer,
            Files::All => Offload::All,
        }
    }
}

/// Most tokens in one forward, unless told otherwise.
pub(super) const TOKENS_PER_MICRO_BATCH: usize = 4096;

/// A case.
#[derive(Clone, Debug, Args)]
pub struct Case {
    /// What is measured.
    #[arg(value_enum)]
    pub work: Work,
    /// The model.
    #[arg(long, value_enum, default_value = "small")]
    pub shape: Shape,
    /// What the models compute in.
    #[arg(long, value_enum, default_value = "f32")]
    pub precision: Format,
    /// Keep the linear maps of models that are not trained in 8 bits: the one that `generate` samples from, and reference and
    /// reward model of `ppo`; in bf16 only.
    #[arg(long)]
    pub int8: bool,
    /// Ranks, as threads of one process that share the cores.
    #[arg(long, default_value_t = 1)]
    pub ranks: usize,
    /// ZeRO stage of the trained models, 0 to 3.
    #[arg(long, default_value_t = 0)]
    pub zero_stage: u8,
    /// What models keep in files. These lie in the system's folder for temporary files, which `TMPDIR` names; in one that
    /// is itself in memory nothing is won.
    #[arg(long, value_enum, default_value = "none")]
    pub offload: Files,
    /// Compute activations again in the backward.
    #[arg(long)]
    pub recompute: bool,
    /// Most tokens in one forward; the default is that of the stages.
    #[arg(long, default_value_t = TOKENS_PER_MICRO_BATCH)]
    pub tokens_per_micro_batch: usize,
    /// Steps measured.
    #[arg(long, default_value_t = 5)]
    pub steps: usize,
    /// Steps before those.
    #[arg(long, default_value_t = 2)]
    pub warmup: usize,
    /// Print where the time of the measured steps went.
    #[arg(long)]
    pub profile: bool,
    /// Threads of all ranks together; 0: one for each core.
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
}

impl Case {
    /// A case with the defaults of the command line.
    pub fn new(work: Work, shape: Shape) -> Self {
        Self {
            work,
            shape,
            precision: Format::F32,
            int8: false,
            ranks: 1,
            zero_stage: 0,
            offload: Files::None,
            recompute: false,
            tokens_per_micro_batch: TOKENS_PER_MICRO_BATCH,
            steps: 5,
            warmup: 2,
            profile: false,
            threads: 0,
        }
    }

    /// What the linear maps of models that are not trained are kept in.
    pub fn weights(&self) -> WeightFormat {
        if self.int8 { WeightFormat::Int8 } else { WeightFormat::Precision }
    }

    /// `placement` with what the case says of every model.
    pub(super) fn placed(&self, placement: Placement) -> Placement {
        let (precision, offload) = (self.precision.precision(), self.offload.offload());
        let offload_dir = Some(std::env::temp_dir());
        Placement { precision, offload, offload_dir, ..placement }
    }

    /// Threads of all ranks together.
    pub fn threads(&self) -> usize {
        match self.threads {
            0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            threads => threads,
        }
    }

    /// Measures it in this process.
    ///
    /// # Errors
    /// If the model cannot be made or a step fails.
    pub fn run(&self) -> Result<Measured, BenchError> {
        profile::switch(self.profile);
        let measured = match self.work {
            Work::Sft | Work::Reward => train::run(self),
            Work::Generate => generate::run(self),
            Work::Ppo => ppo::run(self),
        }?;
        if let Some(table) = breakdown(Duration::from_secs_f64(measured.seconds.iter().sum()), self.ranks) {
            eprintln!("{table}");
        }
        Ok(measured)
    }

    /// Measures it in a process of its own.
    ///
    /// # Errors
    /// If the process fails; the error holds its words.
    pub fn run_apart(&self) -> Result<Measured, BenchError> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["case", self.work.name(), "--shape", self.shape.name()]);
        command.args(["--precision", self.precision.name(), "--offload", self.offload.name()]);
        for (name, value) in [
            ("--ranks", self.ranks),
            ("--zero-stage", usize::from(self.zero_stage)),
            ("--tokens-per-micro-batch", self.tokens_per_micro_batch),
            ("--steps", self.steps),
            ("--warmup", self.warmup),
            ("--threads", self.threads),
        ] {
            command.arg(name).arg(value.to_string());
        }
        for (name, is_on) in [("--recompute", self.recompute), ("--int8", self.int8)] {
            if is_on {
                command.arg(name);
            }
        }
        let output = command.output()?;
        if !output.status.success() {
            return Err(format!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr)).into());
        }
        Ok(serde_json::from_slice(&output.stdout)?)
    }
}
