//! `chat`: talk to a model.

use std::process::ExitCode;

use clap::Parser;
use tandem_stages::chat::{self, ChatArgs};
use tandem_stages::{allocator, cli};

#[global_allocator]
static ALLOCATOR: allocator::Allocator = allocator::Allocator;

fn main() -> ExitCode {
    allocator::keep_pages();
    cli::guard(|| chat::run(&ChatArgs::parse()))
}
