//! One bit has no zero: what never has a gradient must not move.

use tandem_engine::model::unit::POSITIONS;
use tandem_engine::parallel::ZeroStage;
use tandem_engine::train::{OptimizerConfig, OptimizerKind};

use crate::ranks::on_ranks;
use crate::toy::{KINDS, LONGEST_ROW, config, engine, placement, step};

#[test]
fn what_has_no_gradient_stays() {
    for kind in KINDS {
        on_ranks(2, |ranks| {
            let config = OptimizerConfig { weight_decay: 0.0, ..config(kind, 4e-3, 60) };
            let mut engine = engine(config, &placement(&ranks, ZeroStage::Zero, 1)).unwrap();
            // The embeddings of positions that no row has.
            let unseen = |engine: &tandem_engine::Engine<tandem_engine::Train>| -> Vec<f32> {
                let positions = engine.model().units().unwrap()[0].get(POSITIONS).unwrap();
                let unseen = positions.narrow(0, LONGEST_ROW, 64 - LONGEST_ROW).unwrap();
                unseen.flatten_all().unwrap().to_vec1().unwrap()
            };
            let before = unseen(&engine);
            for number in 1..=50 {
                step(&mut engine).unwrap();
                let worst =
                    before.iter().zip(&unseen(&engine)).fold(0.0, |worst: f32, (a, b)| worst.max((a - b).abs()));
                match kind {
                    OptimizerKind::SignSgd { .. } => assert!(worst <= 2.0 * 4e-3, "{kind:?}: {worst} in step {number}"),
                    _ => assert_eq!(worst, 0.0, "{kind:?}, step {number}"),
                }
            }
        });
    }
}
