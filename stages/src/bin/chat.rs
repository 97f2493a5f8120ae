//! `chat`: talk to a model.

use std::process::ExitCode;

use clap::Parser;
use tandem_stages::chat::{self, ChatArgs};
use tandem_stages::cli;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    cli::guard(|| chat::run(&ChatArgs::parse()))
}
