//! What a step says it has sent is what the formulas say.

use tandem_collective::compress::Compression;
use tandem_engine::model::unit::{Head, UnitLayout};
use tandem_engine::parallel::{Slicing, ZeroStage};
use tandem_engine::train::OptimizerKind;

use crate::ranks::on_ranks;
use crate::toy::{ONE_BIT, VOTES, ZERO_ONE, config, engine, placement, spec, step};

/// Bytes that each rank has sent in each step.
fn sent(kind: OptimizerKind, world: usize, stage: ZeroStage, steps: usize) -> Vec<Vec<u64>> {
    on_ranks(world, |ranks| {
        let mut engine = engine(config(kind, 1e-3, 40), &placement(&ranks, stage, 1)).unwrap();
        (0..steps).map(|_| step(&mut engine).unwrap().1.wire_bytes).collect()
    })
}

fn lengths() -> Vec<usize> {
    UnitLayout::all(&spec(), Head::Language).iter().map(UnitLayout::len).collect()
}

#[test]
fn exact_sums_send_four_bytes_both_ways() {
    // The toy's steps have two rounds: gradients are added up over the ranks twice.
    for world in [1, 2, 4] {
        let others = world as u64 - 1;
        let whole: u64 = lengths().iter().map(|&len| 4 * len as u64).sum();
        let padded: u64 = lengths().iter().map(|&len| 4 * Slicing { len, ranks: world }.padded() as u64).sum();
        let total = |stage| sent(OptimizerKind::AdamW, world, stage, 3).into_iter().map(|rank| rank[2]).sum::<u64>();
        // Threads that do not wait for each other add all of it up, each for itself.
        assert_eq!(total(ZeroStage::Zero), others * world as u64 * (2 * whole), "all-reduce");
        for stage in [ZeroStage::One, ZeroStage::Two] {
            assert_eq!(total(stage), others * (2 * padded + padded), "{stage:?}: reduce-scatter, then weights");
        }
        // In each round every block is gathered for the forward and for the backward, the ends for the embedding and the head.
        let gathers = 2 * 2 * padded;
        assert_eq!(total(ZeroStage::Three), others * (2 * padded + gathers), "gathers and reduce-scatter");
    }
}

#[test]
fn one_bit_sends_a_thirtieth() {
    for world in [2, 4] {
        let compressed: u64 = lengths().iter().map(|&len| Compression::new(len, world).wire_bytes()).sum();
        let by_hand: u64 = lengths()
            .iter()
            .map(|&len| 2 * (world as u64 - 1) * (len.next_multiple_of(8 * world) as u64 / 8 / world as u64 + 4))
            .sum();
        assert_eq!(compressed, by_hand, "bits out, scale, bits back, scale");
        let freeze = 6;
        for rank in sent(ONE_BIT, world, ZeroStage::Zero, 12) {
            let exact = rank[0];
            assert!(rank[..freeze].iter().all(|&step| step == exact), "{rank:?}");
            assert!(rank[freeze..].iter().all(|&step| step == compressed), "{rank:?}, not {compressed}");
            // Two rounds add up twice what one compressed exchange replaces: 32 times 2, less scales and padding.
            assert!(exact > 60 * compressed, "{exact} and {compressed}");
        }
        let votes: u64 = lengths().iter().map(|&len| 2 * (world as u64 - 1) * len.div_ceil(8 * world) as u64).sum();
        assert!(sent(VOTES, world, ZeroStage::One, 3).iter().flatten().all(|&step| step == votes));
        for rank in sent(ZERO_ONE, world, ZeroStage::Zero, 24) {
            let exact = rank[0];
            // Exact sums in steps 1 to 3, then every other one, the freeze after step 9; exchanges in all steps up to 13, every
            // other one up to 17, then every third.
            for (step, &bytes) in (1..).zip(&rank) {
                let expected = match step {
                    1..=3 | 4 | 6 | 8 => exact,
                    5 | 7 | 9 | 10..=13 => compressed,
                    14..=17 if step % 2 == 0 => compressed,
                    18.. if step % 3 == 0 => compressed,
                    _ => 0,
                };
                assert_eq!(bytes, expected, "step {step}");
            }
        }
    }
}

#[test]
fn one_rank_sends_nothing() {
    for kind in [ONE_BIT, ZERO_ONE, VOTES] {
        assert!(sent(kind, 1, ZeroStage::Zero, 12)[0].iter().all(|&step| step == 0));
    }
}
