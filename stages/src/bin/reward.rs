//! `reward`: training a reward model.

use std::process::ExitCode;

use tandem_stages::config::Stage;
use tandem_stages::{allocator, cli, reward};

#[global_allocator]
static ALLOCATOR: allocator::Allocator = allocator::Allocator;

fn main() -> ExitCode {
    allocator::keep_pages();
    cli::main(&[Stage::Reward], |launch| launch.profiled(|| reward::run(launch, &launch.config.run.output_dir, None)))
}
