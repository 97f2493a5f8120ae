//! Training in bf16 learns what training in f32 learns.

use tandem_engine::model::unit::Head;
use tandem_engine::parallel::ParallelConfig;
use tandem_engine::parallel::ZeroStage;
use tandem_engine::train::{OptimizerConfig, Schedule, ScheduleKind};
use tandem_engine::{Engine, Model, Precision, Recompute};

use crate::toy::{Layout, negative_sum, optimizer, passes, rows, spec};

const STEPS: u64 = 100;
/// Batches that come again and again, so that there is something to learn.
const BATCHES: u64 = 4;

/// Loss per token of each step.
fn losses(gated: bool, precision: Precision) -> Vec<f64> {
    let model = Model::initial(spec(gated), Head::Language, 7).unwrap().with_precision(precision).unwrap();
    let schedule =
        Schedule { kind: ScheduleKind::Constant, peak_lr: 1e-3, warmup_steps: 5, total_steps: STEPS, min_ratio: 1.0 };
    let mut engine = Engine::new(model, OptimizerConfig { schedule, ..optimizer() }).unwrap();
    let layout = Layout::of(1, ZeroStage::Zero, ParallelConfig::default());
    let step = |step: u64| {
        let rows = rows(step % BATCHES, 8);
        let passes = passes(engine.model().parallel(), &rows, layout.rounds, step);
        let losses = engine.accumulate_all_log_probs(&passes, Recompute::Off, |_, out| negative_sum(out)).unwrap();
        let terms = rows.iter().map(|row| row.len() - 1).sum::<usize>() as f64;
        assert!(engine.step(terms).unwrap().applied);
        losses.iter().flatten().map(|(loss, _)| loss).sum::<f64>() / terms
    };
    (0..STEPS).map(step).collect()
}

#[test]
fn the_loss_of_bf16_is_within_a_hundredth_of_that_of_f32() {
    for gated in [true, false] {
        let [f32, bf16] = [Precision::F32, Precision::Bf16].map(|precision| losses(gated, precision));
        let last = |losses: &[f64]| losses[losses.len() - 20..].iter().sum::<f64>() / 20.0;
        let ratio = last(&bf16) / last(&f32);
        println!("gated {gated}: from {:.3} to {:.4} in f32, {:.4} in bf16", f32[0], last(&f32), last(&bf16));
        assert!(last(&f32) < 0.8 * f32[0], "nothing is learned");
        assert!(f32 != bf16, "the precision makes no difference");
        assert!((ratio - 1.0).abs() < 0.01, "mean loss of the last 20 steps: {ratio} of that of f32");
    }
}
