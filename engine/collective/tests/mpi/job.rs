//! The tests: they start jobs and judge them from outside.

use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use tandem_collective::{Threads, suite};

use crate::roles::DEADLINE;

/// What a test that passed has to say.
type Test = fn() -> String;

pub(crate) const TESTS: [(&str, Test); 9] = [
    ("the suite conforms on 1 to 4 ranks", conformance),
    ("large buffers and crossed waits", large),
    ("a launcher of another MPI is refused", other_launcher),
    ("torchrun without MPI is refused", torchrun),
    ("a rank that panics ends the job", panics),
    ("a rank that hangs is named at the deadline", hangs),
    ("a rank that exits ends the job", exits),
    ("a rank in another call is named", desync),
    ("a rank that aborts says why", aborts),
];

/// What starting and ending a job may take on a busy machine, beyond what it waits for.
const SLACK: Duration = Duration::from_secs(15);

struct Ended {
    code: Option<i32>,
    text: String,
    took: Duration,
}

fn program(role: &str) -> (std::path::PathBuf, String) {
    (std::env::current_exe().unwrap(), format!("role={role}"))
}

fn ended(command: &mut Command, started: Instant) -> Ended {
    let Output { status, stdout, stderr } =
        command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
    let text = format!("{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    Ended { code: status.code(), text, took: started.elapsed() }
}

/// Runs `role` on `ranks` ranks.
fn job(ranks: usize, role: &str) -> Ended {
    let (program, role) = program(role);
    let mut command = Command::new("mpirun");
    // Two ranks of these tests may share a processor, and a container may run them as root.
    command.args(["--oversubscribe", "-n", &ranks.to_string()]).arg(program).arg(role);
    command.envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")]);
    ended(&mut command, Instant::now())
}

/// Runs `role` in one process without a launcher, in an environment that says otherwise.
fn lone(role: &str, variables: &[(&str, &str)]) -> Ended {
    let (program, role) = program(role);
    ended(Command::new(program).arg(role).envs(variables.iter().copied()), Instant::now())
}

/// The done record of a job that has succeeded.
fn done(ended: &Ended) -> &str {
    assert_eq!(ended.code, Some(0), "{}", ended.text);
    let record = ended.text.lines().find_map(|line| line.strip_prefix("done: "));
    record.unwrap_or_else(|| panic!("no done record:\n{}", ended.text))
}

/// A job that has failed as it should: not by success, not by hanging, and with all of `words`.
fn failed(ended: &Ended, within: Duration, words: &[&str]) -> String {
    assert_ne!(ended.code, Some(0), "{}", ended.text);
    assert!(!ended.text.contains("done: "), "a job that fails has no done record:\n{}", ended.text);
    for word in words {
        assert!(ended.text.contains(word), "not said: {word}\n{}", ended.text);
    }
    assert!(ended.took < within + SLACK, "took {:?}:\n{}", ended.took, ended.text);
    format!(" ({:.1} s)", ended.took.as_secs_f32())
}

fn conformance() -> String {
    let mut counts = Vec::new();
    for ranks in 1..=4 {
        // The suite makes the same checks on any backend; ranks as threads say how many that are.
        let threads: Vec<_> = Threads::world(ranks, Duration::from_secs(60))
            .into_iter()
            .map(|world| std::thread::spawn(move || suite::conformance(&world)))
            .collect();
        let expected: Vec<usize> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        let ended = job(ranks, "suite");
        assert_eq!(done(&ended), format!("{} checks on rank 0 of {ranks}", expected[0]), "{}", ended.text);
        counts.push(expected[0].to_string());
    }
    format!(" ({} checks)", counts.join(", "))
}

fn large() -> String {
    for ranks in [2, 3] {
        let ended = job(ranks, "large");
        assert_eq!(done(&ended), format!("large on {ranks}"));
    }
    String::new()
}

fn other_launcher() -> String {
    // What a process sees whose launcher belongs to another MPI library: a size in the environment, no peers.
    let ended = lone("connect", &[("OMPI_COMM_WORLD_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "2")]);
    failed(&ended, Duration::ZERO, &["the launcher started 2 ranks but this MPI sees 1"])
}

fn torchrun() -> String {
    let ended = lone("connect", &[("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")]);
    failed(&ended, Duration::ZERO, &["mpirun -n 2", "srun"]);
    let ended = lone("connect", &[]);
    assert_eq!(done(&ended), "solo, rank 0 of 1");
    let ended = job(2, "connect");
    assert_eq!(done(&ended), "mpi, rank 0 of 2");
    String::new()
}

fn panics() -> String {
    let ended = job(3, "panic");
    failed(&ended, Duration::ZERO, &["rank 2 panicked", "on purpose"])
}

fn hangs() -> String {
    let mut said = String::new();
    for call in ["small", "large", "started", "message", "split"] {
        let ended = job(3, &format!("hang-{call}"));
        let words = ["rank 0: failing[7] did not complete", "rank 1: failing[7] did not complete", "not arrived: [2]"];
        said.push_str(&failed(&ended, DEADLINE, &words));
    }
    said
}

fn exits() -> String {
    let early = failed(&job(3, "exit-0"), Duration::ZERO, &[]);
    early + &failed(&job(3, "exit-3"), Duration::ZERO, &[])
}

fn desync() -> String {
    let tags = job(3, "other-tag");
    let words = [
        "rank 0 called failing[7] while rank 2 called failing[8]",
        "rank 1 called failing[7] while rank 2 called failing[8]",
        "rank 2 called failing[8] while rank",
    ];
    let said = failed(&tags, Duration::ZERO, &words);
    let words = ["rank 1 called barrier while rank 2 called agree", "rank 2 called agree while rank"];
    let said = said + &failed(&job(3, "other-operation"), Duration::ZERO, &words);
    let words = ["rank 0 brought 30 elements while rank 2 brought 31"];
    said + &failed(&job(3, "other-length"), Duration::ZERO, &words)
}

fn aborts() -> String {
    let words = ["rank 0: rank 2 failed: the disk is full", "rank 1: rank 2 failed: the disk is full"];
    failed(&job(3, "abort"), Duration::ZERO, &words)
}
