//! `rlhf`: supervised fine-tuning, reward modelling and PPO from one configuration.

use std::process::ExitCode;

use tandem_stages::config::Stage;
use tandem_stages::{allocator, cli, rlhf};

#[global_allocator]
static ALLOCATOR: allocator::Allocator = allocator::Allocator;

fn main() -> ExitCode {
    allocator::keep_pages();
    cli::main(&Stage::ALL, rlhf::run)
}
