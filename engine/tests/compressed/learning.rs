//! What is sent in one bit still teaches the model.

use tandem_engine::parallel::ZeroStage;
use tandem_engine::train::OptimizerKind;

use crate::ranks::on_ranks;
use crate::toy::{VOTES, VOTES_WITH_FEEDBACK, config, engine, placement, step, terms};

const STEPS: u64 = 300;

/// Mean loss over the first and over the last ten steps.
fn losses(kind: OptimizerKind, peak_lr: f64, world: usize) -> (f64, f64) {
    let ranks = on_ranks(world, |ranks| {
        let mut engine = engine(config(kind, peak_lr, STEPS), &placement(&ranks, ZeroStage::Zero, 1)).unwrap();
        (0..STEPS).map(|_| step(&mut engine).unwrap().0).collect::<Vec<_>>()
    });
    let loss = |number: u64| ranks.iter().map(|rank| rank[number as usize - 1]).sum::<f64>() / terms(number);
    let mean = |steps: std::ops::Range<u64>| steps.map(loss).sum::<f64>() / 10.0;
    (mean(1..11), mean(STEPS - 9..STEPS + 1))
}

#[test]
fn every_kind_learns_nearly_as_adam_does() {
    let one_bit = OptimizerKind::OneBitAdam { freeze_steps: 60 };
    let zero_one = OptimizerKind::ZeroOneAdam {
        freeze_steps: 100,
        variance_updates_per_interval: 16,
        steps_per_local_interval: 50,
        max_local_steps: 4,
    };
    for world in [1, 4] {
        let (start, adam) = losses(OptimizerKind::AdamW, 3e-3, world);
        assert!(start > 3.0 && adam < 0.1, "AdamW goes from {start} to {adam}");
        // Kind, learning rate, share of what AdamW learns.
        for (kind, lr, share) in
            [(one_bit, 3e-3, 0.95), (zero_one, 3e-3, 0.95), (VOTES, 1e-3, 0.8), (VOTES_WITH_FEEDBACK, 6e-3, 0.9)]
        {
            let (_, end) = losses(kind, lr, world);
            let learned = (start - end) / (start - adam);
            assert!(learned > share, "{kind:?} on {world} ranks: from {start} to {end}, AdamW to {adam}");
        }
    }
}
