//! `bench`: whole steps on the shapes that the README quotes; see `tandem_tests::bench`.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tandem_stages::allocator;
use tandem_tests::bench::{BenchError, Case, TableArgs, ZeroArgs};

#[global_allocator]
static ALLOCATOR: allocator::Allocator = allocator::Allocator;

/// Measures whole steps of training, sampling and PPO.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// One kind of work in this process; prints one line of JSON.
    Case(Case),
    /// ZeRO-3 against ZeRO-0, and the sharding of PyTorch and DeepSpeed where they are installed.
    Zero(ZeroArgs),
    /// All kinds of work, and PyTorch on the same where it is installed.
    Table(TableArgs),
}

fn main() -> ExitCode {
    allocator::keep_pages();
    let run = || -> Result<(), BenchError> {
        match Cli::parse().command {
            Command::Case(case) => println!("{}", serde_json::to_string(&case.run()?)?),
            Command::Zero(zero) => zero.run()?,
            Command::Table(table) => table.run()?,
        }
        Ok(())
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
