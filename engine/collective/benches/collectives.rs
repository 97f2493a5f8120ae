//! How near a backend comes to what memory allows.
//!
//! For each operation the bytes that must be read and written are counted (each input once, each output once, by all ranks
//! together) and divided by the bandwidth of plain copies by as many ranks, measured in turns with the operation. "Of bound"
//! is that least time over the measured one; it may pass 100 % where caches save more than a copy can.
//!
//! By itself it measures threads, on 2 and 4 ranks; under a launcher the backend of that launcher, on the ranks it was
//! given. An argument limits the size of the buffers, in MiB.
//!
//! ```text
//! cargo bench -p tandem-collective -- 64
//! cargo bench -p tandem-collective --features mpi --no-run     # prints where the binary is
//! mpirun -n 2 target/release/deps/collectives-* 64
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use tandem_collective::launch::{Connected, connect};
use tandem_collective::{Collective, Result, Tag, Threads};

const DEADLINE: Duration = Duration::from_secs(60);
const MIB: usize = 1 << 20;

/// The least times of an operation and of a plain copy.
#[derive(Clone, Copy)]
struct Least {
    work: Duration,
    copy: Duration,
}

/// What one rank brings and gets.
struct Buffers {
    long: Vec<f32>,
    short: Vec<f32>,
}

/// The least times of `rounds` rounds of `work` and of a plain copy of `copied_bytes`, in turns, so that both see the same
/// machine; each on all ranks at once, and as long as the slowest rank takes.
fn time<B>(
    world: &dyn Collective,
    rounds: usize,
    copied_bytes: usize,
    mut buffers: B,
    work: impl Fn(&dyn Collective, Tag, &mut B) -> Result<()>,
) -> Result<Least> {
    let (from, mut to) = (vec![1_u8; copied_bytes], vec![0_u8; copied_bytes]);
    let mut seconds = Vec::with_capacity(2 * rounds);
    // The first round touches the memory for the first time.
    for round in 0..=rounds as u64 {
        world.barrier(Tag::new("start", round))?;
        let begun = Instant::now();
        work(world, Tag::new("work", round), &mut buffers)?;
        let worked = begun.elapsed();
        world.barrier(Tag::new("copy", round))?;
        let begun = Instant::now();
        to.copy_from_slice(&from);
        std::hint::black_box(&to);
        if round > 0 {
            seconds.extend([worked.as_secs_f32(), begun.elapsed().as_secs_f32()]);
        }
    }
    let mut of_all = vec![0.0; seconds.len() * world.world()];
    world.all_gather_f32(Tag::new("times", 0), &seconds, &mut of_all)?;
    let slowest = |at: usize| of_all.iter().skip(at).step_by(seconds.len()).copied().fold(0.0, f32::max);
    let least = |kind: usize| {
        let least = (0..rounds).map(|round| slowest(2 * round + kind)).fold(f32::INFINITY, f32::min);
        Duration::from_secs_f32(least)
    };
    Ok(Least { work: least(0), copy: least(1) })
}

fn report(world: &dyn Collective, what: &str, mib: usize, least: Least, bytes: usize) {
    if world.rank() > 0 {
        return;
    }
    let ranks = world.world();
    // Copies of half the size, read and written, by all ranks.
    let bandwidth = (ranks * mib * MIB) as f64 / least.copy.as_secs_f64();
    let bound = bytes as f64 / bandwidth;
    println!(
        "{what:<16} {ranks:>5} {mib:>5} {:>10.2} {:>10.2} {:>7.0} % {:>8.1}",
        least.work.as_secs_f64() * 1e3,
        bound * 1e3,
        100.0 * bound / least.work.as_secs_f64(),
        bandwidth / 1e9,
    );
}

/// What every rank of a world does.
fn run(world: &dyn Collective, limit_mib: usize) -> Result<()> {
    let ranks = world.world();
    if world.rank() == 0 {
        println!(
            "{:<16} {:>5} {:>5} {:>10} {:>10} {:>9} {:>8}",
            "operation", "ranks", "MiB", "ms", "bound ms", "of bound", "GB/s"
        );
    }
    for mib in [1, 16, 64, 256].into_iter().filter(|&mib| mib <= limit_mib) {
        let n = mib * MIB / size_of::<f32>();
        let rounds = (1024 / mib).clamp(10, 200);
        let time_of = |parts: [usize; 2], work: &dyn Fn(&dyn Collective, Tag, &mut Buffers) -> Result<()>| {
            let buffers = Buffers { long: vec![1.0; n / parts[0]], short: vec![0.0; n / parts[1]] };
            time(world, rounds, mib * MIB / 2, buffers, work)
        };
        // Everyone reads n and writes n.
        let reduced = time_of([1, n], &|world, tag, buffers| world.all_reduce_sum_f32(tag, &mut buffers.long))?;
        report(world, "all_reduce", mib, reduced, 2 * ranks * mib * MIB);
        // Everyone's n are read once; n / ranks are written by each.
        let scattered = time_of([1, ranks], &|world, tag, buffers| {
            world.reduce_scatter_sum_f32(tag, &buffers.long, &mut buffers.short)
        })?;
        report(world, "reduce_scatter", mib, scattered, (ranks + 1) * mib * MIB);
        // Everyone's n / ranks are read once; n are written by each.
        let gathered =
            time_of([1, ranks], &|world, tag, buffers| world.all_gather_f32(tag, &buffers.short, &mut buffers.long))?;
        report(world, "all_gather", mib, gathered, (ranks + 1) * mib * MIB);
    }
    let calls = 2000;
    let small = time(world, 6, 0, [1.0_f32], |world, tag, values| {
        (0..calls).try_for_each(|_| world.all_reduce_sum_f32(tag, values))
    })?;
    if world.rank() == 0 {
        let microseconds = small.work.as_secs_f64() * 1e6 / f64::from(calls);
        println!("all_reduce of 1 number, one of {calls}: {microseconds:.1} us\n");
    }
    Ok(())
}

fn main() {
    let limit_mib = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(256);
    match connect(DEADLINE, None).expect("ranks cannot be connected") {
        Connected::Process { world, .. } if world.world() > 1 => {
            run(&*world, limit_mib).expect("a call failed");
            drop(world);
            #[cfg(feature = "mpi")]
            tandem_collective::mpi::finish().expect("MPI cannot be left");
        }
        _ => {
            for ranks in [2, 4] {
                std::thread::scope(|scope| {
                    let rank = move |world: Arc<dyn Collective>| run(&*world, limit_mib).expect("a call failed");
                    for world in Threads::world(ranks, DEADLINE) {
                        scope.spawn(move || rank(world));
                    }
                });
            }
        }
    }
}
