//! The command line that all stage binaries share, and the way from it to an exit code.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use crate::config::{Config, Origin, Stage};
use crate::error::{ExitCode, Result, StageError};
use crate::run::Resume;
use crate::stop::StopFlag;

const EXIT_CODES: &str = "\
Exit codes:
   0  done
   2  the configuration or the command line cannot be used
   3  the data or a model cannot be used
   4  halted: the numbers of training went wrong
   5  ranks lost each other; start again
   6  the output directory is in use by another run
   7  a checkpoint cannot be written, or none can be read
  70  a fault of this program
  75  stopped on request (SIGTERM, Ctrl-C) with the state saved; start again to continue

TANDEM_LOG=debug prints more.";

/// The arguments of `sft`, `reward`, `ppo` and `rlhf`.
#[derive(Debug, Clone, Parser)]
#[command(version, after_help = EXIT_CODES)]
pub struct StageArgs {
    /// The configuration, a TOML file.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Override one value of it, for example ppo.iterations=5. May be repeated.
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    pub set: Vec<String>,
    /// Where everything is written, instead of the configuration's run.output_dir.
    #[arg(long, value_name = "DIR")]
    pub output_dir: Option<PathBuf>,
    /// Whether to continue what is in the output directory, or to set it aside and start over.
    #[arg(long, value_enum, default_value_t)]
    pub resume: Resume,
    /// Check everything, print the plan, and write nothing.
    #[arg(long)]
    pub dry_run: bool,
}

/// What a stage is started with.
#[derive(Debug, Clone)]
pub struct Launch {
    /// The configuration, checked for the stages that are to be run.
    pub config: Config,
    /// Continue or start over.
    pub resume: Resume,
    /// Check and print only.
    pub dry_run: bool,
    /// Asks for a stop.
    pub stop: StopFlag,
}

/// How a stage ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All is done.
    Finished,
    /// Stopped on request; the state is saved.
    Stopped,
}

impl Launch {
    /// The whole configuration with all defaults filled in, as TOML: what `--dry-run` prints.
    ///
    /// # Errors
    /// None for a configuration that was read from TOML.
    pub fn plan_text(&self) -> Result<String> {
        toml::to_string(&self.config).map_err(StageError::bug)
    }
}

impl StageArgs {
    /// Loads the configuration and checks it for `stages`.
    ///
    /// # Errors
    /// [`ConfigError`](crate::config::ConfigError) with the file, the key and the remedy.
    pub fn launch(self, stages: &[Stage], stop: StopFlag) -> Result<Launch> {
        let mut config = Config::load(&self.config, &self.set)?;
        if let Some(output_dir) = self.output_dir {
            config.run.output_dir = output_dir;
        }
        config.check(stages, &Origin::File(self.config))?;
        Ok(Launch { config, resume: self.resume, dry_run: self.dry_run, stop })
    }
}

/// The `main` of a stage binary: reads the command line, prepares the process, runs `body`, and turns its end into an
/// exit code.
pub fn main(stages: &[Stage], body: impl FnOnce(&Launch) -> Result<Outcome>) -> std::process::ExitCode {
    guard(|| {
        let args = StageArgs::parse();
        let stop = StopFlag::on_signals().map_err(StageError::bug)?;
        let launch = args.launch(stages, stop)?;
        set_threads(launch.config.run.threads)?;
        body(&launch)
    })
}

/// Runs a binary's `body`; errors and panics become a message on standard error and an exit code.
pub fn guard(body: impl FnOnce() -> Result<Outcome>) -> std::process::ExitCode {
    let filter = EnvFilter::try_from_env("TANDEM_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let logging = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).without_time();
    // Already set in a process that runs several bodies, as tests do; the first one stays.
    let _ = logging.with_target(false).try_init();
    let code = exit_code(catch_unwind(AssertUnwindSafe(body)));
    std::process::ExitCode::from(code as u8)
}

fn exit_code(ended: std::result::Result<Result<Outcome>, Box<dyn Any + Send>>) -> ExitCode {
    match ended {
        Ok(Ok(Outcome::Finished)) => ExitCode::Done,
        Ok(Ok(Outcome::Stopped)) => {
            eprintln!("stopped; the state is saved: start again with the same command to continue");
            ExitCode::Preempted
        }
        Ok(Err(error)) => {
            eprintln!("error: {error}");
            error.exit_code()
        }
        // The panic has printed its own message and place.
        Err(_) => {
            eprintln!("error: internal error; please report it with the command line and the configuration");
            ExitCode::Bug
        }
    }
}

/// Sets the number of threads of all computations; `None`: one per core.
pub(crate) fn set_threads(threads: Option<usize>) -> Result<()> {
    let Some(threads) = threads else { return Ok(()) };
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().map_err(StageError::bug)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(args: &[&str]) -> std::result::Result<StageArgs, clap::Error> {
        StageArgs::try_parse_from([&["sft"], args].concat())
    }

    #[test]
    fn the_arguments_of_the_contract() {
        StageArgs::command().debug_assert();
        let args = parse(&[
            "--config",
            "a.toml",
            "--set",
            "ppo.iterations=5",
            "--set",
            "run.seed=1",
            "--output-dir",
            "out",
            "--resume",
            "never",
            "--dry-run",
        ])
        .unwrap();
        assert_eq!(args.set, ["ppo.iterations=5", "run.seed=1"]);
        assert_eq!(args.output_dir.as_deref(), Some("out".as_ref()));
        assert_eq!(args.resume, Resume::Never);
        assert!(args.dry_run);
        assert_eq!(parse(&["--config", "a.toml"]).unwrap().resume, Resume::Auto);
        assert_eq!(parse(&[]).unwrap_err().exit_code(), ExitCode::Config as i32);
        assert_eq!(parse(&["--config", "a", "--resume", "maybe"]).unwrap_err().exit_code(), ExitCode::Config as i32);
    }

    #[test]
    fn the_printed_plan_is_the_plan() {
        let config = Config::parse("[run]\nseed = 5\n[model.new]", &Origin::Defaults, &[]).unwrap();
        let launch = Launch { config, resume: Resume::Auto, dry_run: true, stop: StopFlag::default() };
        let again = Config::parse(&launch.plan_text().unwrap(), &Origin::Defaults, &[]).unwrap();
        assert_eq!(again, launch.config);
    }

    #[test]
    fn ends_have_their_codes() {
        assert_eq!(exit_code(Ok(Ok(Outcome::Finished))), ExitCode::Done);
        assert_eq!(exit_code(Ok(Ok(Outcome::Stopped))), ExitCode::Preempted);
        assert_eq!(exit_code(Ok(Err(StageError::bug("x")))), ExitCode::Bug);
        assert_eq!(exit_code(Err(Box::new("panic"))), ExitCode::Bug);
    }
}
