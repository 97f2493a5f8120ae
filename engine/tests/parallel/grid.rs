//! Every layout gives the weights of one rank, bit for bit.

use tandem_engine::parallel::{ParallelConfig, ZeroStage};
use tandem_engine::{Precision, Recompute};

use crate::ranks::on_ranks;
use crate::toy::{Layout, Trained, engine, spec, train, weight_bits};

const STAGES: [ZeroStage; 4] = [ZeroStage::Zero, ZeroStage::One, ZeroStage::Two, ZeroStage::Three];

fn trained(layout: &Layout, gated: bool, steps: u64) -> Trained {
    let mut all = on_ranks(layout.world, |world| {
        let placement = layout.placement(&world).unwrap();
        let mut engine = engine(&spec(gated), &placement).unwrap();
        let norms = train(&mut engine, layout, steps, 13).unwrap();
        Trained { weights: weight_bits(engine.model()).unwrap(), norms }
    });
    assert!(all.iter().all(|rank| rank.norms == all[0].norms), "{layout:?}: ranks disagree on the gradient's norm");
    all.swap_remove(0)
}

/// Compares what two runs have come to, telling how far apart they are.
fn check(found: &Trained, expected: &Trained, what: &str) {
    let values = |run: &Trained| run.weights.iter().map(|&bits| f64::from(f32::from_bits(bits))).collect::<Vec<_>>();
    let (a, b) = (values(found), values(expected));
    assert_eq!(a.len(), b.len());
    let worst = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert_eq!(found.norms, expected.norms, "{what}: norms differ");
    assert!(found.weights == expected.weights, "{what}: weights differ by up to {worst:e}");
}

#[test]
fn every_layout_equals_one_rank() {
    for gated in [true, false] {
        for (rounds, recompute) in [(1, Recompute::Off), (2, Recompute::On)] {
            for tensor_lanes in [1, 2] {
                let config = ParallelConfig { data_lanes: 4, tensor_lanes, ..ParallelConfig::default() };
                let alone = Layout { rounds, recompute, ..Layout::of(1, ZeroStage::Zero, config) };
                let expected = trained(&alone, gated, 10);
                for world in [2, 4] {
                    for stage in STAGES {
                        for tensor in [1, 2] {
                            for pipeline in [1, 2] {
                                if tensor > tensor_lanes || tensor * pipeline > world {
                                    continue;
                                }
                                let config = ParallelConfig { tensor, pipeline, ..config };
                                let layout = Layout { rounds, recompute, ..Layout::of(world, stage, config) };
                                check(&trained(&layout, gated, 10), &expected, &format!("{layout:?}"));
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn every_layout_equals_one_rank_in_bf16() {
    // World, ZeRO stage, tensor, pipeline, units gathered ahead, units kept whole.
    let layouts = [
        (2, ZeroStage::Zero, 1, 1, 1, 0),
        (2, ZeroStage::One, 1, 1, 1, 0),
        (2, ZeroStage::Two, 1, 1, 1, 0),
        (2, ZeroStage::Three, 1, 1, 0, 0),
        (2, ZeroStage::Zero, 2, 1, 1, 0),
        (2, ZeroStage::Zero, 1, 2, 1, 0),
        (4, ZeroStage::Three, 1, 1, 3, 0),
        (4, ZeroStage::Three, 1, 1, 1, 1 << 20),
        (4, ZeroStage::Three, 2, 1, 1, 0),
        (4, ZeroStage::Three, 1, 2, 1, 0),
        (4, ZeroStage::One, 2, 2, 1, 0),
        (4, ZeroStage::Two, 1, 2, 1, 0),
    ];
    for gated in [true, false] {
        for rounds in [1, 2] {
            for tensor_lanes in [1, 2] {
                let config = ParallelConfig { data_lanes: 4, tensor_lanes, ..ParallelConfig::default() };
                let alone = Layout { rounds, precision: Precision::Bf16, ..Layout::of(1, ZeroStage::Zero, config) };
                let expected = trained(&alone, gated, 4);
                let recomputed = Layout { recompute: Recompute::On, ..alone };
                check(&trained(&recomputed, gated, 4), &expected, "recomputed");
                differs_as_bf16_does(&expected, &trained(&Layout { precision: Precision::F32, ..alone }, gated, 4));
                for (world, stage, tensor, pipeline, prefetch_units, persistence_threshold) in layouts {
                    if tensor > tensor_lanes {
                        continue;
                    }
                    let config = ParallelConfig { tensor, pipeline, ..config };
                    let recompute = if world == 4 { Recompute::On } else { Recompute::Off };
                    let placed = Layout { world, stage, config, ..alone };
                    let layout = Layout { recompute, prefetch_units, persistence_threshold, ..placed };
                    check(&trained(&layout, gated, 4), &expected, &format!("{layout:?}"));
                }
            }
        }
    }
}

/// Another format gives other bits, and nearly the same gradients: the error of a gradient that some 60 roundings (those of
/// four blocks, forward and backward) of at most 2⁻⁸ each lead to adds up to no more than their number at worst, and grows
/// as its root if they are independent: 8 · 2⁻⁸.
fn differs_as_bf16_does(found: &Trained, in_f32: &Trained) {
    assert!(found.weights != in_f32.weights, "the precision makes no difference");
    for (a, b) in found.norms.iter().zip(&in_f32.norms).map(|(&a, &b)| (f64::from_bits(a), f64::from_bits(b))) {
        assert!((a / b - 1.0).abs() < 8.0 / 256.0, "norm of the gradient {a}, in f32 {b}");
    }
}
