//! PyTorch on the same work, through `tests/peers/steps.py`.

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

/// A Python with PyTorch and transformers.
pub(super) struct Peer {
    python: PathBuf,
    threads: usize,
}

impl Peer {
    pub(super) fn new(python: &Path, threads: usize) -> Self {
        Self { python: python.to_path_buf(), threads }
    }

    /// Measures one variant in a process of its own.
    pub(super) fn run(
        &self,
        work: Work,
        shape: Shape,
        precision: &str,
        variant: &str,
        steps: usize,
    ) -> Result<Measured, BenchError> {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/peers/steps.py");
        let mut command = Command::new(&self.python);
        command.args([script, work.name(), "--shape", shape.name(), "--precision", precision, "--variant", variant]);
        command.args(["--threads", &self.threads.to_string(), "--steps", &steps.to_string()]);
        for name in ["OMP_NUM_THREADS", "MKL_NUM_THREADS"] {
            command.env(name, self.threads.to_string());
        }
        if let Some(allocator) = ALLOCATORS.iter().find(|path| Path::new(path).exists()) {
            command.env("LD_PRELOAD", allocator);
        }
        let output = command.output()?;
        let words = String::from_utf8_lossy(&output.stdout);
        match words.lines().rev().find_map(|line| serde_json::from_str(line).ok()) {
            Some(measured) if output.status.success() => Ok(measured),
            _ => Err(format!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr)).into()),
        }
    }
}
