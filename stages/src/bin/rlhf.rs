//! `rlhf`: supervised fine-tuning, reward modelling and PPO from one configuration.

use std::process::ExitCode;

use tandem_stages::config::Stage;
use tandem_stages::{cli, rlhf};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    cli::main(&Stage::ALL, rlhf::run)
}
