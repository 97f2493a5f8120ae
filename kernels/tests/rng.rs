//! Philox against its published vectors, and the streams built on it.

use std::collections::HashSet;

use tandem_kernels::rng::{Philox, Purpose, philox4x32};

/// `kat_vectors` of Random123 1.14, `philox4x32 10`.
#[test]
fn known_answers() {
    let vectors = [
        ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
        ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
        (
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
        ),
    ];
    for (counter, key, expected) in vectors {
        assert_eq!(philox4x32(counter, key), expected);
    }
}

/// Every part of the address matters, and neighbours in one part are not neighbours in another.
#[test]
fn addresses_do_not_collide() {
    let mut seen = HashSet::new();
    let mut count = 0;
    for seed in [0, 1, u64::MAX] {
        for purpose in
            [Purpose::Init, Purpose::Order, Purpose::Sample, Purpose::Dropout, Purpose::Split, Purpose::Blend]
        {
            for step in [0, 1, 2, 1 << 40] {
                let rng = Philox::new(seed, purpose, step);
                for sample in [0, 1, 1 << 32, u64::MAX] {
                    for position in 0..4 {
                        for counter in 0..4 {
                            seen.insert(rng.block(sample, position, counter));
                            count += 1;
                        }
                    }
                }
            }
        }
    }
    assert_eq!(seen.len(), count);
}

/// A seed must keep its meaning. The values are those of a second implementation of the documented packing.
#[test]
fn streams_are_pinned() {
    let rng = Philox::new(42, Purpose::Sample, 7);
    assert_eq!(rng, Philox::new(42, Purpose::Sample, 7));
    assert_eq!(rng.block(3, 5, 11), [0x0793_9610, 0x4390_b825, 0x6e00_dcf8, 0x4b45_8b61]);
    assert_eq!(Philox::new(42, Purpose::Order, 0).shuffle(10, 0), [9, 8, 6, 3, 7, 5, 1, 0, 2, 4]);
}

#[test]
fn uniforms_are_uniform() {
    let rng = Philox::new(1, Purpose::Sample, 0);
    let mut bins = [0f64; 100];
    let draws = 100_000;
    for index in 0..draws {
        let u = rng.uniform(index, 0, 0);
        assert!((0.0..1.0).contains(&u));
        bins[(u * 100.0) as usize] += 1.0;
    }
    let expected = draws as f64 / 100.0;
    let chi_square: f64 = bins.iter().map(|bin| (bin - expected).powi(2) / expected).sum();
    // 99 degrees of freedom: the 0.1 % and 99.9 % quantiles.
    assert!((60.0..149.0).contains(&chi_square), "{chi_square}");
}

#[test]
fn normals_have_the_moments_of_a_normal() {
    let rng = Philox::new(3, Purpose::Init, 0);
    let mut values = vec![0f32; 200_001];
    rng.fill_normal(5, 0, 1.0, &mut values);
    let moment = |power: i32| values.iter().map(|&x| f64::from(x).powi(power)).sum::<f64>() / values.len() as f64;
    // Five standard errors of each moment: sqrt(var(x^k) / n).
    for (power, expected, variance) in [(1, 0.0, 1.0f64), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)] {
        let bound = 5.0 * (variance / values.len() as f64).sqrt();
        assert!((moment(power) - expected).abs() < bound, "moment {power}: {}", moment(power));
    }
    let neighbours: f64 = values.windows(2).map(|pair| f64::from(pair[0] * pair[1])).sum::<f64>() / 200_000.0;
    assert!(neighbours.abs() < 5.0 / (200_000f64).sqrt(), "correlation {neighbours}");
    assert!((f64::from(values[0]) - rng.normal(5, 0, 0)).abs() < 1e-7);
}

#[test]
fn a_part_of_a_filled_tensor_is_the_same_alone() {
    let rng = Philox::new(3, Purpose::Init, 0);
    let mut whole = vec![0f32; 10_000];
    rng.fill_normal(0, 0, 0.02, &mut whole);
    for range in [0..10_000, 0..1, 1..2, 1..4098, 4095..9001, 777..778, 9999..10_000] {
        let mut part = vec![0f32; range.len()];
        rng.fill_normal(0, range.start, 0.02, &mut part);
        assert_eq!(part, whole[range.clone()], "{range:?}");
    }
}

#[test]
fn shuffles_are_permutations_and_uniform() {
    let rng = Philox::new(9, Purpose::Order, 0);
    assert!(rng.shuffle(0, 0).is_empty());
    assert_eq!(rng.shuffle(1, 0), [0]);
    let mut sorted = rng.shuffle(1000, 4);
    assert_ne!(sorted, rng.shuffle(1000, 5));
    sorted.sort_unstable();
    assert_eq!(sorted, (0..1000).collect::<Vec<_>>());
    // All 24 orders of four things are equally frequent.
    let mut counts = std::collections::HashMap::new();
    for sample in 0..24_000 {
        *counts.entry(rng.shuffle(4, sample)).or_insert(0f64) += 1.0;
    }
    let chi_square: f64 = counts.values().map(|count| (count - 1000.0).powi(2) / 1000.0).sum();
    // 23 degrees of freedom: the 99.9 % quantile.
    assert!(counts.len() == 24 && chi_square < 49.7, "{chi_square}");
}

#[test]
fn below_stays_below() {
    let rng = Philox::new(9, Purpose::Split, 0);
    for bound in [1, 2, 7, u64::MAX] {
        assert!((0..1000).all(|sample| rng.below(bound, sample, 0, 0) < bound));
    }
    assert_eq!(rng.below(0, 0, 0, 0), 0);
}
