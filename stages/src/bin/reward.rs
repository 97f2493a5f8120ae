//! `reward`: training a reward model.

use std::process::ExitCode;

use tandem_stages::config::Stage;
use tandem_stages::{cli, reward};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    cli::main(&[Stage::Reward], |launch| reward::run(launch, &launch.config.run.output_dir, None))
}
