//! Compressed sums against naive twins that hold all ranks at once.

use std::sync::Arc;
use std::time::Duration;

use super::{Compression, compressed_all_reduce, sign_majority};
use crate::collective::Collective;
use crate::error::Error;
use crate::tag::Tag;
use crate::threads::Threads;

fn on_all<T: Send>(ranks: usize, work: impl Fn(&Arc<dyn Collective>) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let work = &work;
        let world = Threads::world(ranks, Duration::from_secs(60));
        let threads: Vec<_> = world.into_iter().map(|rank| scope.spawn(move || work(&rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn numbers(step: usize, rank: usize, length: usize) -> Vec<f32> {
    (0..length).map(|i| (((i * 7919 + rank * 104_729 + step * 31) % 2003) as f32 - 1001.0) * 1.3e-3).collect()
}

fn sign(x: f32) -> f32 {
    if x >= 0.0 { 1.0 } else { -1.0 }
}

/// The formula, element by element, without bits or blocks.
struct Twin {
    worker: Vec<Vec<f32>>,
    server: Vec<Vec<f32>>,
}

impl Twin {
    fn new(ranks: usize, padded: usize) -> Self {
        Self { worker: vec![vec![0.0; padded]; ranks], server: vec![vec![0.0; padded / ranks]; ranks] }
    }

    fn rms(x: &[f32]) -> f32 {
        let lane = |lane: usize| x.iter().skip(lane).step_by(8).fold(0.0, |sum, &x| sum + f64::from(x) * f64::from(x));
        ((0..8).map(lane).fold(0.0, |sum, lane| sum + lane) / x.len() as f64).sqrt() as f32
    }

    fn tree(values: &[f32]) -> f32 {
        let mut mid = values.len().next_power_of_two();
        if mid == values.len() {
            mid = values.len().div_ceil(2);
        } else {
            mid /= 2;
        }
        if values.len() == 1 { values[0] } else { Self::tree(&values[..mid]) + Self::tree(&values[mid..]) }
    }

    fn step(&mut self, brought: &[Vec<f32>]) -> Vec<f32> {
        let ranks = brought.len();
        let (padded, chunk) = (self.worker[0].len(), self.server[0].len());
        let mut said = vec![vec![0.0; padded]; ranks];
        for rank in 0..ranks {
            let x: Vec<f32> =
                (0..padded).map(|i| self.worker[rank][i] + brought[rank].get(i).copied().unwrap_or(0.0)).collect();
            let s = Self::rms(&x);
            for i in 0..padded {
                said[rank][i] = s * sign(x[i]);
                self.worker[rank][i] = x[i] - said[rank][i];
            }
        }
        let mut result = Vec::new();
        for server in 0..ranks {
            let y: Vec<f32> = (0..chunk)
                .map(|i| {
                    let column: Vec<f32> = said.iter().map(|said| said[server * chunk + i]).collect();
                    self.server[server][i] + Self::tree(&column) / ranks as f32
                })
                .collect();
            let s = Self::rms(&y);
            for i in 0..chunk {
                result.push(s * sign(y[i]));
                self.server[server][i] = y[i] - s * sign(y[i]);
            }
        }
        result.truncate(brought[0].len());
        result
    }
}

#[test]
fn compression_is_the_formula() {
    for (ranks, length) in [(1, 100), (2, 1), (2, 5000), (3, 1000), (4, 40_003), (5, 77), (6, 4999)] {
        let padded = Compression::padded(length, ranks);
        let mut twin = Twin::new(ranks, padded);
        let steps = 4;
        let expected: Vec<Vec<f32>> = (0..steps)
            .map(|step| twin.step(&(0..ranks).map(|rank| numbers(step, rank, length)).collect::<Vec<_>>()))
            .collect();
        let states = on_all(ranks, |world| {
            let mut state = Compression::new(length, ranks);
            for (step, expected) in expected.iter().enumerate() {
                let mut values = numbers(step, world.rank(), length);
                compressed_all_reduce(&**world, Tag::new("compressed", step as u64), &mut values, &mut state).unwrap();
                let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&values), bits(expected), "{ranks} ranks, {length} numbers, step {step}");
            }
            state
        });
        for (rank, state) in states.iter().enumerate() {
            assert_eq!(state.worker_error, twin.worker[rank]);
            assert_eq!(state.server_error, twin.server[rank]);
        }
    }
}

#[test]
fn padding_is_that_of_deepspeed() {
    let padded: Vec<usize> = [1, 2, 3, 4, 6, 8, 12].map(|world| Compression::padded(1, world)).to_vec();
    assert_eq!(padded, [8, 16, 72, 32, 144, 64, 288], "world * lcm(world, 8)");
    assert_eq!(Compression::padded(0, 3), 0);
    assert_eq!(Compression::padded(72, 3), 72);
}

#[test]
fn nothing_is_lost_over_time() {
    let (ranks, length) = (2, 256);
    on_all(ranks, |world| {
        let mut state = Compression::new(length, ranks);
        let truth: Vec<f64> = (0..length)
            .map(|i| (0..ranks).map(|rank| f64::from(numbers(0, rank, length)[i])).sum::<f64>() / ranks as f64)
            .collect();
        let scale = truth.iter().map(|x| x.abs()).fold(0.0, f64::max);
        let mut total = vec![0.0_f64; length];
        let mut worst = Vec::new();
        for step in 1..=1000_u32 {
            let mut values = numbers(0, world.rank(), length);
            compressed_all_reduce(&**world, Tag::new("mean", step.into()), &mut values, &mut state).unwrap();
            for (total, value) in total.iter_mut().zip(&values) {
                *total += f64::from(*value);
            }
            if [10, 100, 1000].contains(&step) {
                let error = |(total, truth): (&f64, &f64)| (total / f64::from(step) - truth).abs();
                worst.push(total.iter().zip(&truth).map(error).fold(0.0, f64::max) / scale);
            }
        }
        // The error that is carried is bounded, so that of the mean falls as one over the steps.
        assert!(worst[0] > 0.02, "one bit is not exact at once: {worst:?}");
        assert!(worst[1] < worst[0] / 4.0 && worst[2] < worst[1] / 4.0 && worst[2] < 0.02, "{worst:?}");
    });
}

#[test]
fn the_bytes_are_counted() {
    for (ranks, length) in [(1, 1000), (2, 64_000), (3, 72_000), (4, 64_000)] {
        on_all(ranks, |world| {
            let before = world.traffic();
            let mut state = Compression::new(length, ranks);
            let sent_bytes =
                compressed_all_reduce(&**world, Tag::new("bytes", 0), &mut numbers(0, 0, length), &mut state).unwrap();
            let traffic = world.traffic().since(before);
            assert_eq!((traffic.sent_bytes, traffic.received_bytes), (sent_bytes, sent_bytes));
            // Bits both ways, and two scales for each peer.
            assert_eq!(sent_bytes as usize, 2 * (ranks - 1) * (length / 8 / ranks + 4));

            let before = world.traffic();
            let sent_bytes = sign_majority(&**world, Tag::new("bytes", 1), &mut numbers(0, 0, length)).unwrap();
            let traffic = world.traffic().since(before);
            assert_eq!((traffic.sent_bytes, traffic.received_bytes), (sent_bytes, sent_bytes));
            assert_eq!(sent_bytes as usize, 2 * (ranks - 1) * (length / 8 / ranks));
        });
    }
}

#[test]
fn a_state_for_other_buffers_is_refused() {
    let world = crate::Solo::new();
    let tag = Tag::new("state", 0);
    let error = compressed_all_reduce(&world, tag, &mut [0.0; 9], &mut Compression::new(8, 1)).unwrap_err();
    assert!(matches!(error, Error::WrongLength { expected: 8, got: 9, .. }), "{error}");
    let error = compressed_all_reduce(&world, tag, &mut [0.0; 8], &mut Compression::new(8, 2)).unwrap_err();
    assert!(matches!(error, Error::WrongLength { expected: 1, got: 2, .. }), "{error}");
    let mut state = Compression::new(8, 1);
    compressed_all_reduce(&world, tag, &mut [1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0], &mut state).unwrap();
    assert_ne!(state, Compression::new(8, 1));
    state.reset();
    assert_eq!(state, Compression::new(8, 1));
    assert_eq!(compressed_all_reduce(&world, tag, &mut [], &mut Compression::new(0, 1)).unwrap(), 0);
}

#[test]
fn the_majority_decides_and_ties_are_positive() {
    for (ranks, length) in [(1, 9), (2, 1), (3, 1000), (4, 64), (5, 12_345)] {
        on_all(ranks, |world| {
            let mut values = numbers(1, world.rank(), length);
            sign_majority(&**world, Tag::new("majority", 0), &mut values).unwrap();
            let brought: Vec<Vec<f32>> = (0..ranks).map(|rank| numbers(1, rank, length)).collect();
            for (i, value) in values.iter().enumerate() {
                let sum: f32 = brought.iter().map(|brought| sign(brought[i])).sum();
                assert_eq!(*value, sign(sum), "{ranks} ranks, number {i}");
            }
            assert_eq!(sign_majority(&**world, Tag::new("majority", 1), &mut []).unwrap(), 0);
        });
    }
}
