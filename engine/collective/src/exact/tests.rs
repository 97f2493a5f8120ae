//! Exact sums against the machine's addition and a naive twin.

use super::*;

fn sum(values: &[f64]) -> ExactSum {
    let mut sum = ExactSum::new();
    sum.extend(values.iter().copied());
    sum
}

/// SplitMix64.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut x = *state;
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

/// Any finite number.
fn any(state: &mut u64) -> f64 {
    loop {
        let value = f64::from_bits(random(state));
        if value.is_finite() {
            return value;
        }
    }
}

/// The naive twin: numbers whose lowest bit is 2^-60 or more and whose sum is below 2^67, in an i128, rounded by asking
/// both neighbours which is nearer.
fn twin(values: &[f64]) -> f64 {
    let unit = 2_f64.powi(60);
    // A number is cut into halves that a multiplication and a cast keep exactly.
    let fixed = |value: f64| {
        let high = (value * 2_f64.powi(20)).trunc();
        ((high as i128) << 40) + ((value * unit) - high * 2_f64.powi(40)) as i128
    };
    let total: i128 = values.iter().map(|&value| fixed(value)).sum();
    let near = total as f64 / unit;
    let mut best = near;
    for candidate in [near.next_down(), near.next_up()] {
        let distance = |x: f64| (fixed(x) - total).unsigned_abs();
        if distance(candidate) < distance(best) {
            best = candidate;
        }
    }
    best
}

#[test]
fn it_is_small() {
    assert!(size_of::<ExactSum>() < 1024);
    assert_eq!(sum(&[]).value().to_bits(), 0.0_f64.to_bits());
}

#[test]
fn one_value_is_itself() {
    let mut state = 1;
    for _ in 0..20_000 {
        let value = any(&mut state);
        assert_eq!(sum(&[value]).value().to_bits(), value.to_bits(), "{value:e}");
    }
    let edges = [f64::MAX, f64::MIN, f64::MIN_POSITIVE, 5e-324, -5e-324, f64::MIN_POSITIVE.next_down(), 1.0, -1.5];
    for value in edges {
        assert_eq!(sum(&[value]).value().to_bits(), value.to_bits(), "{value:e}");
    }
    assert_eq!(sum(&[-0.0]).value().to_bits(), 0.0_f64.to_bits(), "an exact zero is positive");
}

#[test]
fn two_values_give_the_correctly_rounded_sum() {
    // The machine's addition is correctly rounded too.
    let mut state = 2;
    for round in 0..40_000 {
        let one = any(&mut state);
        // Half of the time numbers that are near each other, so that all bits meet.
        let other = if round % 2 == 0 { any(&mut state) } else { -one * (random(&mut state) as f64 / 2_f64.powi(63)) };
        let expected = one + other;
        let expected = if expected == 0.0 { 0.0 } else { expected };
        assert_eq!(sum(&[one, other]).value().to_bits(), expected.to_bits(), "{one:e} + {other:e}");
    }
}

#[test]
fn many_values_give_what_the_naive_twin_gives() {
    let mut state = 3;
    for round in 0..500 {
        let values: Vec<f64> = (0..1 + round % 40)
            .map(|_| {
                let mantissa = (random(&mut state) >> 11) as f64 - 2_f64.powi(52);
                mantissa * 2_f64.powi((random(&mut state) % 68) as i32 - 60)
            })
            .collect();
        assert_eq!(sum(&values).value(), twin(&values), "{values:?}");
    }
}

#[test]
fn cancellation_is_exact() {
    assert_eq!(sum(&[1e308, -1e308, 1e-308]).value(), 1e-308);
    assert_eq!(sum(&[1e308, 1e-308, -1e308]).value(), 1e-308);
    assert_eq!(sum(&[f64::MAX, f64::MAX, -f64::MAX]).value(), f64::MAX, "sums may pass the range on their way");
    assert_eq!(sum(&[f64::MAX, f64::MAX]).value(), f64::INFINITY);
    assert_eq!(sum(&[f64::MIN, f64::MIN]).value(), f64::NEG_INFINITY);
    assert_eq!(sum(&[5e-324, -1.0, 1.0]).value(), 5e-324);
    // Half a unit in the last place goes to even, a bit more goes up, and the greatest number rounds to infinity.
    let half = 2_f64.powi(-53);
    assert_eq!(sum(&[1.0, half]).value(), 1.0);
    assert_eq!(sum(&[1.0 + 2.0 * half, half]).value(), 1.0 + 4.0 * half);
    assert_eq!(sum(&[1.0, half, 5e-324]).value(), 1.0 + 2.0 * half);
    assert_eq!(sum(&[-1.0, -half, -5e-324]).value(), -1.0 - 2.0 * half);
    assert_eq!(sum(&[f64::MAX, 2_f64.powi(970)]).value(), f64::INFINITY);
    assert_eq!(sum(&[f64::MAX, 2_f64.powi(969)]).value(), f64::MAX);
}

#[test]
fn infinities_and_nan_are_kept() {
    assert_eq!(sum(&[1.0, f64::INFINITY]).value(), f64::INFINITY);
    assert_eq!(sum(&[f64::NEG_INFINITY, f64::MAX]).value(), f64::NEG_INFINITY);
    assert!(sum(&[f64::NEG_INFINITY, f64::INFINITY]).value().is_nan());
    assert!(sum(&[f64::NAN, f64::INFINITY]).value().is_nan());
    let mut merged = sum(&[f64::INFINITY]);
    merged.merge(&sum(&[f64::NEG_INFINITY]));
    assert!(ExactSum::from_bytes(&merged.to_bytes()).unwrap().value().is_nan());
}

#[test]
fn order_and_partition_do_not_matter() {
    let mut state = 4;
    let mut values: Vec<f64> = (0..997).map(|_| any(&mut state)).collect();
    let expected = sum(&values).to_bytes();
    for _ in 0..50 {
        for i in (1..values.len()).rev() {
            values.swap(i, (random(&mut state) % (i as u64 + 1)) as usize);
        }
        let mut total = ExactSum::new();
        let mut rest = values.as_slice();
        while !rest.is_empty() {
            let (part, others) = rest.split_at(1 + (random(&mut state) as usize) % rest.len());
            total.merge(&ExactSum::from_bytes(&sum(part).to_bytes()).unwrap());
            rest = others;
        }
        assert_eq!(total.to_bytes(), expected);
        assert_eq!(total.value().to_bits(), sum(&values).value().to_bits());
    }
}

#[test]
fn carries_are_made_in_time() {
    // Digits that hold almost all they can, where the greatest number is added.
    let mut digits = [i64::MAX - (4 << 32); DIGITS];
    digits[66..].fill(0);
    let mut full = ExactSum { additions: ADDITIONS - 3, digits, special: 0 };
    let mut carried = ExactSum::from_bytes(&full.to_bytes()).unwrap();
    for _ in 0..8 {
        full.add(f64::MAX);
        carried.add(f64::MAX);
    }
    assert_eq!(full, carried);
}

#[test]
fn other_bytes_are_refused() {
    let bytes = sum(&[1.0]).to_bytes();
    assert!(ExactSum::from_bytes(&bytes[1..]).is_none());
    assert!(ExactSum::from_bytes(&[]).is_none());
    let mut damaged = bytes;
    damaged[BYTES - 1] = 8;
    assert!(ExactSum::from_bytes(&damaged).is_none());
}

#[test]
fn ranks_agree_with_one_rank() {
    let mut state = 5;
    let values: Vec<f64> = (0..300).map(|_| any(&mut state)).collect();
    let alone = sum(&values).value().to_bits();
    for ranks in [1, 2, 3, 4] {
        std::thread::scope(|scope| {
            for world in crate::Threads::world(ranks, std::time::Duration::from_secs(60)) {
                let values = &values;
                scope.spawn(move || {
                    let mine: Vec<f64> = values.iter().copied().skip(world.rank()).step_by(ranks).collect();
                    let mut sums = [sum(&mine), sum(&[world.rank() as f64])];
                    all_reduce_exact(&*world, Tag::new("exact", 0), &mut sums).unwrap();
                    assert_eq!(sums[0].value().to_bits(), alone);
                    assert_eq!(sums[1].value(), (ranks * (ranks - 1) / 2) as f64);
                    all_reduce_exact(&*world, Tag::new("exact", 1), &mut []).unwrap();
                });
            }
        });
    }
}
