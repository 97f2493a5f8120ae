//! PyTorch on the same work, through the scripts of `tests/peers`.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{BenchError, Measured, Shape, Work};

/// The faster allocators, where Debian puts them: PyTorch gains up to a third.
const ALLOCATORS: [&str; 2] =
    ["/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4", "/usr/lib/x86_64-linux-gnu/libjemalloc.so.2"];

/// The ways that the peer has of doing a kind of work; the best one counts.
pub(super) fn variants(work: Work) -> &'static [&'static str] {
    match work {
        Work::Sft | Work::Reward => &["eager", "compiled"],
        Work::Generate => &["generate", "loop"],
        Work::Ppo => &["eager", "loop"],
    }
}

/// Ways by other libraries, which are measured only where they are asked for by name.
pub(super) fn libraries(work: Work) -> &'static [&'static str] {
    match work {
        Work::Sft | Work::Reward => &[],
        Work::Generate => &["ctranslate2"],
        Work::Ppo => &["trl"],
    }
}

/// A Python with PyTorch and transformers.
pub(super) struct Peer {
    python: PathBuf,
    threads: usize,
}

impl Peer {
    pub(super) fn new(python: &Path, threads: usize) -> Result<Self, BenchError> {
        // A path, unlike a name to be looked for, is made absolute; what a virtual environment's link points to is not asked.
        let is_path = python.components().count() > 1;
        let python = if is_path { std::path::absolute(python)? } else { python.to_path_buf() };
        Ok(Self { python, threads })
    }

    /// Measures one variant of whole steps in a process of its own.
    pub(super) fn run(
        &self,
        work: Work,
        shape: Shape,
        precision: &str,
        variant: &str,
        steps: usize,
    ) -> Result<Measured, BenchError> {
        let script = if libraries(work).contains(&variant) {
            concat!(env!("CARGO_MANIFEST_DIR"), "/peers/libraries.py")
        } else {
            concat!(env!("CARGO_MANIFEST_DIR"), "/peers/steps.py")
        };
        self.call(
            script,
            &[work.name(), "--shape", shape.name(), "--precision", precision, "--variant", variant],
            steps,
            self.threads,
        )
    }

    /// Measures SFT steps on `ranks` processes among which `library` shards everything.
    pub(super) fn run_sharded(
        &self,
        library: &str,
        shape: Shape,
        precision: &str,
        ranks: usize,
        steps: usize,
    ) -> Result<Measured, BenchError> {
        self.call(
            concat!(env!("CARGO_MANIFEST_DIR"), "/peers/sharded.py"),
            &[library, "--shape", shape.name(), "--precision", precision, "--ranks", &ranks.to_string()],
            steps,
            (self.threads / ranks).max(1),
        )
    }

    /// Runs a script whose processes have `threads` threads each.
    fn call(&self, script: &str, args: &[&str], steps: usize, threads: usize) -> Result<Measured, BenchError> {
        let mut command = Command::new(&self.python);
        command.arg(script).args(args);
        command.args(["--threads", &self.threads.to_string(), "--steps", &steps.to_string()]);
        for name in ["OMP_NUM_THREADS", "MKL_NUM_THREADS"] {
            command.env(name, threads.to_string());
        }
        if let Some(allocator) = ALLOCATORS.iter().find(|path| Path::new(path).exists()) {
            command.env("LD_PRELOAD", allocator);
        }
        // Extensions are built by tools that lie beside a virtual environment's Python.
        if let Some(folder) = self.python.parent().filter(|folder| folder.is_absolute()) {
            let rest = std::env::var_os("PATH").unwrap_or_default();
            let folders = std::iter::once(folder.to_path_buf()).chain(std::env::split_paths(&rest));
            command.env("PATH", std::env::join_paths(folders)?);
        }
        let output = command.output()?;
        let words = String::from_utf8_lossy(&output.stdout);
        match words.lines().rev().find_map(|line| serde_json::from_str(line).ok()) {
            Some(measured) if output.status.success() => Ok(measured),
            _ => Err(format!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr)).into()),
        }
    }
}
