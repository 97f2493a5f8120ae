//! `sft`: supervised fine-tuning.

use std::process::ExitCode;

use tandem_stages::config::Stage;
use tandem_stages::{cli, sft};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    cli::main(&[Stage::Sft], |launch| sft::run(launch, &launch.config.run.output_dir, None))
}
