//! The command line that all stage binaries share, and the way from it to an exit code.

use std::any::Any;
use std::fmt::Display;
use std::num::NonZero;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use clap::Parser;
use tandem_collective::{Collective, Solo, Status, Tag};
use tandem_engine::parallel::Mesh;
use tandem_kernels::profile;
use tracing_subscriber::EnvFilter;

use crate::config::{Config, Origin, Stage};
use crate::error::{ExitCode, Result, StageError};
use crate::monitor::{Progress, breakdown};
use crate::ranks::{self, LEADER};
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
  75  stopped on request (SIGTERM, SIGUSR1, Ctrl-C) with the state saved; start again to continue

TANDEM_LOG=debug prints more.";

/// The environment variable that says what is logged.
pub(crate) const LOG_VARIABLE: &str = "TANDEM_LOG";

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
    /// Print where the time went at the end of each stage: seconds and GFLOP/s by class of kernels.
    #[arg(long)]
    pub profile: bool,
    /// How many ranks share the work, all in this process. Under mpirun or srun leave it out: they start the ranks. With
    /// --dry-run: how many to plan for; none is started.
    #[arg(long, value_name = "N")]
    pub ranks: Option<NonZero<usize>>,
    /// With --dry-run: how many of the ranks are on one machine; all by default.
    #[arg(long, value_name = "N", requires = "dry_run")]
    pub ranks_per_node: Option<NonZero<usize>>,
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
    /// Ranks in this process.
    pub ranks_here: usize,
    /// This rank and its peers.
    pub world: Arc<dyn Collective>,
    /// How the ranks share the work; in a dry run those that are planned for.
    pub mesh: Mesh,
    /// Machines that these ranks are on.
    pub nodes: usize,
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
    /// A launch of one rank that continues what is there and stops for nothing.
    pub fn new(config: Config) -> Self {
        Self {
            config,
            resume: Resume::Auto,
            dry_run: false,
            stop: StopFlag::default(),
            ranks_here: 1,
            world: Arc::new(Solo::default()),
            mesh: Mesh::SOLO,
            nodes: 1,
        }
    }

    /// The same launch as the rank of `world` sees it.
    pub fn on(&self, world: Arc<dyn Collective>) -> Self {
        let (stop, nodes) = (self.stop.for_rank(), world.topology().nodes());
        Self { world, stop, nodes, ..self.clone() }
    }

    /// Whether this is the rank that writes files and speaks to people.
    pub fn is_leader(&self) -> bool {
        self.world.rank() == LEADER
    }

    /// Prints a line on the leader's standard output.
    pub fn say(&self, text: impl Display) {
        if self.is_leader() {
            println!("{text}");
        }
    }

    /// Runs a stage and, if that was asked for, prints where its time went.
    ///
    /// # Errors
    /// Those of `stage`.
    pub fn profiled(&self, stage: impl FnOnce() -> Result<Outcome>) -> Result<Outcome> {
        let start = Instant::now();
        let outcome = stage()?;
        if let Some(table) = self.is_leader().then(|| breakdown(start.elapsed(), self.ranks_here)).flatten() {
            println!("{table}");
        }
        Ok(outcome)
    }

    /// Progress called `label` over `total` steps, of which `done` were made before, shown by the leader.
    pub fn progress(&self, label: &str, total: u64, done: u64) -> Progress {
        if self.is_leader() { Progress::new(label, total, done) } else { Progress::silent() }
    }

    /// To be asked once at each safe point, by all ranks: whether any of them has been asked to stop.
    ///
    /// # Errors
    /// A peer that failed.
    pub fn should_stop(&self, tag: Tag) -> Result<bool> {
        let status = if self.stop.is_requested() { Status::Stop } else { Status::Healthy };
        Ok(self.world.agree(tag, status)? >= Status::Stop)
    }

    /// The whole configuration with all defaults filled in, as TOML: what `--dry-run` prints.
    ///
    /// # Errors
    /// None for a configuration that was read from TOML.
    pub fn plan_text(&self) -> Result<String> {
        toml::to_string(&self.config).map_err(StageError::bug)
    }
}

impl StageArgs {
    /// Loads the configuration and checks it for `stages`; for a dry run also whether they can be run on so many ranks.
    ///
    /// # Errors
    /// [`ConfigError`](crate::config::ConfigError) with the file, the key and the remedy.
    pub fn launch(self, stages: &[Stage], stop: StopFlag) -> Result<Launch> {
        let mut config = Config::load(&self.config, &self.set)?;
        if let Some(output_dir) = self.output_dir {
            config.run.output_dir = output_dir;
        }
        let origin = Origin::File(self.config);
        config.check(stages, &origin)?;
        let mut launch = Launch { resume: self.resume, dry_run: self.dry_run, stop, ..Launch::new(config) };
        if launch.dry_run {
            let ranks = self.ranks.map_or(1, NonZero::get);
            launch.mesh = launch.config.mesh(ranks, stages, &origin)?;
            launch.nodes = ranks.div_ceil(self.ranks_per_node.map_or(ranks, NonZero::get));
        }
        Ok(launch)
    }
}

/// The `main` of a stage binary: reads the command line, prepares the process, runs `body` on all ranks, and turns its end
/// into an exit code.
pub fn main(stages: &[Stage], body: impl Fn(&Launch) -> Result<Outcome> + Sync) -> std::process::ExitCode {
    guard(|| {
        let args = StageArgs::parse();
        let stop = StopFlag::on_signals().map_err(StageError::bug)?;
        profile::switch(args.profile);
        let ranks = args.ranks.map(NonZero::get);
        ranks::start(args.launch(stages, stop)?, stages, ranks, body)
    })
}

/// Runs a binary's `body`; errors and panics become a message on standard error and an exit code.
pub fn guard(body: impl FnOnce() -> Result<Outcome>) -> std::process::ExitCode {
    let filter = EnvFilter::try_from_env(LOG_VARIABLE).unwrap_or_else(|_| EnvFilter::new("info"));
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
        let launch = Launch { dry_run: true, ..Launch::new(config) };
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
