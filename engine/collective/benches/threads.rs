//! How near the thread backend comes to what memory allows.
//!
//! For each operation the bytes that must be read and written are counted (each input once, each output once, by all ranks
//! together) and divided by the bandwidth of plain copies by as many threads, measured in turns with the operation. "Of bound"
//! is that least time over the measured one; it may pass 100 % where caches save more than a copy can. Run with `cargo bench -p tandem-collective`; an argument limits the
//! buffer size, in MiB.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tandem_collective::{Collective, Result, Tag, Threads};

const DEADLINE: Duration = Duration::from_secs(60);
const MIB: usize = 1 << 20;

/// What one rank measures in one round.
#[derive(Clone, Copy, Default)]
struct Round {
    work: Duration,
    copy: Duration,
}

/// The least times of `rounds` rounds of `work` and of a plain copy of `copied_bytes`, in turns, so that both see the same
/// machine; each on all threads at once, and as long as the slowest rank takes.
fn time<B>(
    ranks: usize,
    rounds: usize,
    copied_bytes: usize,
    prepare: impl Fn() -> B + Sync,
    work: impl Fn(&dyn Collective, Tag, &mut B) -> Result<()> + Sync,
) -> Round {
    let all: Vec<Vec<Round>> = std::thread::scope(|scope| {
        let (prepare, work) = (&prepare, &work);
        let run = move |world: Arc<dyn Collective>| -> Result<Vec<Round>> {
            let mut buffers = prepare();
            let (from, mut to) = (vec![1_u8; copied_bytes], vec![0_u8; copied_bytes]);
            let mut times = Vec::new();
            for round in 0..rounds as u64 {
                world.barrier(Tag::new("start", round))?;
                let begun = Instant::now();
                work(&*world, Tag::new("work", round), &mut buffers)?;
                let work = begun.elapsed();
                world.barrier(Tag::new("copy", round))?;
                let begun = Instant::now();
                to.copy_from_slice(&from);
                std::hint::black_box(&to);
                times.push(Round { work, copy: begun.elapsed() });
            }
            Ok(times)
        };
        let threads: Vec<_> =
            Threads::world(ranks, DEADLINE).into_iter().map(|world| scope.spawn(move || run(world))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a rank panicked").expect("a call failed")).collect()
    });
    // The first round touches the memory for the first time.
    let least = |time: fn(&Round) -> Duration| {
        let slowest = |round: usize| all.iter().map(|times| time(&times[round])).max().unwrap_or_default();
        (1..rounds).map(slowest).min().unwrap_or_default()
    };
    Round { work: least(|round| round.work), copy: least(|round| round.copy) }
}

fn report(what: &str, ranks: usize, mib: usize, round: Round, bytes: usize) {
    // Copies of half the size, read and written, by all ranks.
    let bandwidth = (ranks * mib * MIB) as f64 / round.copy.as_secs_f64();
    let bound = bytes as f64 / bandwidth;
    println!(
        "{what:<16} {ranks:>5} {mib:>5} {:>10.2} {:>10.2} {:>7.0} % {:>8.1}",
        round.work.as_secs_f64() * 1e3,
        bound * 1e3,
        100.0 * bound / round.work.as_secs_f64(),
        bandwidth / 1e9,
    );
}

fn main() {
    let limit_mib = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(256);
    println!(
        "{:<16} {:>5} {:>5} {:>10} {:>10} {:>9} {:>8}",
        "operation", "ranks", "MiB", "ms", "bound ms", "of bound", "GB/s"
    );
    for ranks in [2, 4] {
        for mib in [1, 16, 64, 256].into_iter().filter(|&mib| mib <= limit_mib) {
            let n = mib * MIB / size_of::<f32>();
            let rounds = (1024 / mib).clamp(10, 200);
            let time_of = |work: &(dyn Fn(&dyn Collective, Tag, &mut Buffers) -> Result<()> + Sync),
                           parts: [usize; 2]| {
                let prepare = || Buffers { long: vec![1.0; n / parts[0]], short: vec![0.0; n / parts[1]] };
                time(ranks, rounds, mib * MIB / 2, prepare, work)
            };
            // Everyone reads n and writes n.
            let reduced = time_of(&|world, tag, buffers| world.all_reduce_sum_f32(tag, &mut buffers.long), [1, n]);
            report("all_reduce", ranks, mib, reduced, 2 * ranks * mib * MIB);
            // Everyone's n are read once; n / ranks are written by each.
            let scattered = time_of(
                &|world, tag, buffers| world.reduce_scatter_sum_f32(tag, &buffers.long, &mut buffers.short),
                [1, ranks],
            );
            report("reduce_scatter", ranks, mib, scattered, (ranks + 1) * mib * MIB);
            // Everyone's n / ranks are read once; n are written by each.
            let gathered = time_of(
                &|world, tag, buffers| world.all_gather_f32(tag, &buffers.short, &mut buffers.long),
                [1, ranks],
            );
            report("all_gather", ranks, mib, gathered, (ranks + 1) * mib * MIB);
        }
    }
    println!("\n{:<16} {:>5} {:>18}", "operation", "ranks", "us each, of 2000");
    for ranks in [2, 4] {
        let calls = 2000;
        let prepare = || [1.0_f32];
        let small = time(ranks, 6, 0, prepare, |world, tag, values| {
            (0..calls).try_for_each(|_| world.all_reduce_sum_f32(tag, values))
        });
        println!("{:<16} {ranks:>5} {:>18.1}", "all_reduce of 1", small.work.as_secs_f64() * 1e6 / f64::from(calls));
    }
}

/// What one rank brings and gets.
struct Buffers {
    long: Vec<f32>,
    short: Vec<f32>,
}
