//! `sft`: supervised fine-tuning.

use std::process::ExitCode;

use tandem_stages::config::Stage;
use tandem_stages::{allocator, cli, sft};

#[global_allocator]
static ALLOCATOR: allocator::Allocator = allocator::Allocator;

fn main() -> ExitCode {
    allocator::keep_pages();
    cli::main(&[Stage::Sft], |launch| launch.profiled(|| sft::run(launch, &launch.config.run.output_dir, None)))
}
