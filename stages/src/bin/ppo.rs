//! `ppo`: proximal policy optimisation of a language model against a reward.

use std::process::ExitCode;

use tandem_stages::config::Stage;
use tandem_stages::{cli, ppo};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    cli::main(&[Stage::Ppo], |launch| ppo::run(launch, &launch.config.run.output_dir, None))
}
