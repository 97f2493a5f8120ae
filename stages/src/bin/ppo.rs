//! `ppo`: proximal policy optimisation of a language model against a reward.

use std::process::ExitCode;

use tandem_stages::config::Stage;
use tandem_stages::{allocator, cli, ppo};

#[global_allocator]
static ALLOCATOR: allocator::Allocator = allocator::Allocator;

fn main() -> ExitCode {
    allocator::keep_pages();
    cli::main(&[Stage::Ppo], |launch| launch.profiled(|| ppo::run(launch, &launch.config.run.output_dir, None)))
}
