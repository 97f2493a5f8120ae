//! A rank that is a process of its own, started by `mpirun` or `srun`.

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::sleep;
use std::time::Duration;

use tandem_collective::Collective;

use super::failures::{RankFailure, RankFailures};
use crate::error::{ExitCode, Result};

/// How long a rank that only echoes another one's failure leaves it to that one to say so and to end the job.
const COURTESY: Duration = Duration::from_secs(5);

/// Runs `body` as one rank of `world` and leaves the world in an orderly way. A rank that fails tells its peers and then
/// ends the whole job with its exit code.
///
/// # Errors
/// None that returns: a failure ends the process.
pub(super) fn run<T>(world: &Arc<dyn Collective>, body: impl FnOnce() -> Result<T>) -> Result<T> {
    let finish = |value: T| finish().map(|()| value);
    let failure = match catch_unwind(AssertUnwindSafe(|| body().and_then(finish))) {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(error)) => RankFailure::of_error(world.rank(), &error),
        Err(payload) => RankFailure::of_panic(world.rank(), &*payload),
    };
    let (why, is_echo, code) = (failure.message.clone(), failure.is_echo, failure.code);
    let failures = RankFailures::new(world.world(), vec![failure]);
    if is_echo {
        sleep(COURTESY);
    }
    // In one piece, so that the words of several ranks do not mix; nothing can be done if nobody listens.
    let _ = std::io::stderr().write_all(format!("error: {failures}\n").as_bytes());
    world.abort(&why);
    kill(code)
}

#[cfg(feature = "mpi")]
fn finish() -> Result<()> {
    Ok(tandem_collective::mpi::finish()?)
}

#[cfg(not(feature = "mpi"))]
fn finish() -> Result<()> {
    Ok(())
}

#[cfg(feature = "mpi")]
fn kill(code: ExitCode) -> ! {
    tandem_collective::mpi::kill(code as i32)
}

#[cfg(not(feature = "mpi"))]
fn kill(code: ExitCode) -> ! {
    std::process::exit(code as i32)
}
