//! Micro-batches under a token budget.

use proptest::prelude::*;
use tandem_data::packing::{Packing, pack_by_tokens};

fn load(batch: &[usize], lengths: &[usize]) -> usize {
    batch.iter().map(|&sample| lengths[sample]).sum()
}

/// First-fit decreasing, the slow and obvious way.
fn naive_first_fit_decreasing(lengths: &[usize], budget: usize) -> usize {
    let mut sorted = lengths.to_vec();
    sorted.sort_unstable_by(|a, b| b.cmp(a));
    let mut rooms: Vec<usize> = Vec::new();
    for length in sorted {
        match rooms.iter_mut().find(|room| **room >= length) {
            Some(room) => *room -= length,
            None => rooms.push(budget.saturating_sub(length)),
        }
    }
    rooms.len()
}

proptest! {
    #[test]
    fn every_sample_is_packed_once_and_budgets_hold(
        lengths in prop::collection::vec(1usize..50, 0..80), budget in 1usize..120, decreasing in any::<bool>(),
    ) {
        let packing = if decreasing { Packing::FirstFitDecreasing } else { Packing::InOrder };
        let batches = pack_by_tokens(&lengths, budget, 50, packing).unwrap();
        let mut all: Vec<usize> = batches.concat();
        if packing == Packing::InOrder {
            prop_assert!(all.is_sorted());
        }
        all.sort_unstable();
        prop_assert_eq!(all, (0..lengths.len()).collect::<Vec<_>>());
        for batch in &batches {
            prop_assert!(!batch.is_empty());
            prop_assert!(load(batch, &lengths) <= budget || batch.len() == 1);
            prop_assert!(batch.is_sorted());
        }
        if decreasing {
            prop_assert_eq!(batches.len(), naive_first_fit_decreasing(&lengths, budget));
        }
    }
}

#[test]
fn in_order_fills_up_to_the_budget() {
    let batches = pack_by_tokens(&[3, 3, 4, 9, 12, 1], 10, 12, Packing::InOrder).unwrap();
    assert_eq!(batches, [vec![0, 1, 2], vec![3], vec![4], vec![5]]);
}

#[test]
fn first_fit_decreasing_fills_the_gaps() {
    let batches = pack_by_tokens(&[3, 7, 4, 9, 6, 1], 10, 12, Packing::FirstFitDecreasing).unwrap();
    assert_eq!(batches, [vec![0, 1], vec![2, 4], vec![3, 5]]);
}

#[test]
fn impossible_samples_are_named() {
    let error =
        |lengths: &[usize], budget| pack_by_tokens(lengths, budget, 8, Packing::InOrder).unwrap_err().to_string();
    assert!(error(&[3, 9], 10).contains("sample 1 has 9 tokens, more than the 8"));
    assert!(error(&[0], 10).contains("sample 0 has no tokens"));
    assert!(error(&[1], 0).contains("above 0"));
}
