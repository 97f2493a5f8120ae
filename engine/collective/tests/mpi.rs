//! The MPI backend under a real launcher: the conformance suite on 1 to 4 ranks, and jobs in which one rank fails.
//!
//! The test starts itself under `mpirun`; what a rank does is its first argument. A job has succeeded only if rank 0 has
//! printed its done record: the exit code of a launcher is no proof, some answer 0 when a rank leaves early.
//! Without the cargo feature `mpi` there is nothing to test; with it, an `mpirun` on PATH is required.

#[cfg(not(feature = "mpi"))]
fn main() {
    println!("skipped: built without the cargo feature `mpi`");
}

#[cfg(feature = "mpi")]
#[path = "mpi/job.rs"]
mod job;
#[cfg(feature = "mpi")]
#[path = "mpi/roles.rs"]
mod roles;

#[cfg(feature = "mpi")]
fn main() {
    if let Some(role) = std::env::args().nth(1).and_then(|arg| arg.strip_prefix("role=").map(str::to_owned)) {
        return roles::play(&role);
    }
    let mut passed = 0;
    for (name, test) in job::TESTS {
        print!("{name} ... ");
        // A test that fails panics, which ends the process with an error.
        println!("ok{}", test());
        passed += 1;
    }
    println!("{passed} tests passed");
    assert_eq!(passed, job::TESTS.len());
}
