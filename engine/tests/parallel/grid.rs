//! Every layout gives the weights of one rank, bit for bit.

use tandem_engine::Recompute;
use tandem_engine::parallel::{ParallelConfig, ZeroStage};

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
