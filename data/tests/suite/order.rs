//! Order, cursor and blend.

use proptest::prelude::*;
use tandem_data::blend::blend;
use tandem_data::order::permutation;
use tandem_data::{Cursor, Sampler};

#[test]
fn permutations_are_fixed_for_ever() {
    // A change of these numbers would change every run's data order: a stored cursor would lose its meaning.
    assert_eq!(permutation(7, 0, 10), PERMUTATION_7_0_10);
    assert_ne!(permutation(7, 1, 10), PERMUTATION_7_0_10);
    assert_ne!(permutation(8, 0, 10), PERMUTATION_7_0_10);
}

const PERMUTATION_7_0_10: [usize; 10] = [3, 9, 0, 6, 8, 2, 1, 5, 7, 4];

#[test]
fn every_place_is_equally_likely() {
    let mut counts = [[0u32; 5]; 5];
    for epoch in 0..20_000 {
        for (place, sample) in permutation(1, epoch, 5).into_iter().enumerate() {
            counts[place][sample] += 1;
        }
    }
    // 4,000 expected in each cell; five standard deviations are 283.
    assert!(counts.iter().flatten().all(|&count| count.abs_diff(4_000) < 283), "{counts:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn a_run_stopped_anywhere_goes_on_with_the_next_sample(
        len in 1usize..60, seed in any::<u64>(), stop in 0usize..200, first in 1usize..17, second in 1usize..17,
    ) {
        let total = 240;
        let expected: Vec<usize> = Sampler::new(len, seed).unwrap().take(total).collect();
        let mut sampler = Sampler::new(len, seed).unwrap();
        let mut seen = Vec::new();
        while seen.len() < stop {
            seen.extend(sampler.next_batch(first));
        }
        let saved: Cursor = serde_json::from_str(&serde_json::to_string(&sampler.cursor()).unwrap()).unwrap();
        let mut resumed = Sampler::new(len, seed).unwrap().resume(saved).unwrap();
        while seen.len() < total {
            seen.extend(resumed.next_batch(second));
        }
        prop_assert_eq!(&seen[..total], &expected[..]);
    }

    #[test]
    fn each_sample_comes_exactly_once_per_epoch(len in 1usize..200, seed in any::<u64>()) {
        let mut sampler = Sampler::new(len, seed).unwrap();
        for _ in 0..3 {
            let mut epoch = sampler.next_batch(len);
            epoch.sort_unstable();
            prop_assert_eq!(epoch, (0..len).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_blend_without_weights_is_every_row_once(sizes in prop::collection::vec(0usize..40, 1..5), seed in any::<u64>()) {
        let picks = blend(&sizes, &vec![None; sizes.len()], seed).unwrap();
        let unique: std::collections::HashSet<_> = picks.iter().copied().collect();
        prop_assert_eq!(unique.len(), sizes.iter().sum::<usize>());
        prop_assert_eq!(picks.len(), unique.len());
        prop_assert!(picks.iter().all(|pick| pick.row < sizes[pick.source]));
    }

    #[test]
    fn a_weighted_blend_keeps_its_shares_all_along(
        sources in prop::collection::vec((1usize..60, 0.1f64..10.0), 1..5), seed in any::<u64>(),
    ) {
        let (sizes, weights): (Vec<usize>, Vec<f64>) = sources.into_iter().unzip();
        let total: usize = sizes.iter().sum();
        let picks = blend(&sizes, &weights.iter().map(|&weight| Some(weight)).collect::<Vec<_>>(), seed).unwrap();
        prop_assert_eq!(picks.len(), total);
        let sum: f64 = weights.iter().sum();
        for source in 0..sizes.len() {
            let share = weights[source] / sum;
            let mut given = 0.0;
            let mut times = vec![0usize; sizes[source]];
            for (place, pick) in picks.iter().enumerate() {
                if pick.source == source {
                    given += 1.0;
                    times[pick.row] += 1;
                }
                // Never further from its due than one row, plus the rounding of its total to whole rows.
                prop_assert!((given - share * (place + 1) as f64).abs() <= 2.5);
            }
            // No row a second time before every row came once.
            prop_assert!(times.iter().max().unwrap() - times.iter().min().unwrap() <= 1);
        }
    }
}

#[test]
fn the_datas_own_order_can_be_kept() {
    let mut sampler = Sampler::in_order(3).unwrap();
    assert_eq!(sampler.next_batch(7), [0, 1, 2, 0, 1, 2, 0]);
    assert_eq!(sampler.cursor(), Cursor { epoch: 2, position: 1 });
}

#[test]
fn a_cursor_past_the_data_is_refused() {
    let error = Sampler::new(3, 0).unwrap().resume(Cursor { epoch: 0, position: 4 }).unwrap_err().to_string();
    assert!(error.contains("the data has changed"), "{error}");
    assert!(Sampler::new(0, 0).is_err());
}

#[test]
fn senseless_weights_are_refused() {
    for (sizes, weights, reason) in [
        (vec![], vec![], "0 sources"),
        (vec![1, 1], vec![Some(1.0), None], "either every source"),
        (vec![1, 1], vec![Some(1.0), Some(-1.0)], "at least 0"),
        (vec![1, 1], vec![Some(f64::NAN), Some(1.0)], "at least 0"),
        (vec![1, 1], vec![Some(0.0), Some(0.0)], "above 0"),
        (vec![1, 0], vec![Some(1.0), Some(1.0)], "no rows"),
    ] {
        let error = blend(&sizes, &weights, 0).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
}
