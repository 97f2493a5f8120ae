//! What the optimizers that compress cannot do is refused at once.

use tandem_engine::parallel::{Parallel, ParallelConfig, Placement, ZeroStage};
use tandem_engine::train::OptimizerKind;
use tandem_engine::{Engine, Error};

use crate::ranks::on_ranks;
use crate::toy::{KINDS, accumulate, bits, config, engine, placement, step, terms, weights};

fn refusal(kind: OptimizerKind, stage: ZeroStage, mesh: ParallelConfig) -> Vec<String> {
    on_ranks(2, |ranks| {
        let placement = Placement::of(Parallel::new(&ranks, &mesh).unwrap(), stage);
        match engine(config(kind, 1e-3, 10), &placement) {
            Err(error @ Error::Optimizer { .. }) => error.to_string(),
            other => panic!("{kind:?}: {other:?}"),
        }
    })
}

#[test]
fn other_layouts_are_refused() {
    for kind in KINDS {
        for stage in [ZeroStage::Two, ZeroStage::Three] {
            let said = refusal(kind, stage, ParallelConfig::default());
            assert!(
                said.iter().all(|said| said.contains(&kind.to_string()) && said.contains("zero_stage")),
                "{said:?}"
            );
        }
        for mesh in [
            ParallelConfig { tensor: 2, ..ParallelConfig::default() },
            ParallelConfig { pipeline: 2, ..ParallelConfig::default() },
        ] {
            let said = refusal(kind, ZeroStage::Zero, mesh);
            assert!(said.iter().all(|said| said.contains("set both to 1")), "{said:?}");
        }
    }
}

#[test]
fn knobs_without_sense_are_refused() {
    let zero_one = |freeze_steps, per_variance, per_local, longest| OptimizerKind::ZeroOneAdam {
        freeze_steps,
        variance_updates_per_interval: per_variance,
        steps_per_local_interval: per_local,
        max_local_steps: longest,
    };
    for (kind, name) in [
        (OptimizerKind::OneBitAdam { freeze_steps: 0 }, "freeze_steps"),
        (zero_one(0, 1, 1, 1), "freeze_steps"),
        (zero_one(1, 0, 1, 1), "variance_updates_per_interval"),
        (zero_one(1, 1, 0, 1), "steps_per_local_interval"),
        (zero_one(1, 1, 1, 0), "max_local_steps"),
    ] {
        let error = engine(config(kind, 1e-3, 10), &Placement::solo()).unwrap_err().to_string();
        assert!(error.contains(&format!("{name} must be at least 1")), "{error}");
    }
}

#[test]
fn a_gradient_that_is_not_finite_on_one_rank_moves_nothing_on_any() {
    for kind in KINDS {
        let ranks = on_ranks(2, |ranks| {
            let mut engine = engine(config(kind, 1e-3, 30), &placement(&ranks, ZeroStage::Zero, 1)).unwrap();
            (0..12).for_each(|_| assert!(step(&mut engine).unwrap().1.applied));
            let before = bits(&weights(&engine));
            let factor = if ranks.rank() == 1 { f64::NAN } else { 1.0 };
            accumulate(&mut engine, 13, factor).unwrap();
            let outcome = engine.step(terms(13)).unwrap();
            assert!(!outcome.applied && outcome.grad_norm.is_nan() && engine.optimizer().step() == 12, "{kind:?}");
            assert_eq!(bits(&weights(&engine)), before, "{kind:?}");
            step(&mut engine).unwrap();
            weights(&engine)
        });
        assert!(
            ranks.iter().flatten().flatten().all(|weight| weight.is_finite()),
            "{kind:?}: the step after it is sound"
        );
    }
}

#[test]
fn ranks_do_not_join_over_a_pending_gradient() {
    let mut engine: Engine<_> = engine(config(KINDS[1], 1e-3, 10), &Placement::solo()).unwrap();
    accumulate(&mut engine, 1, 1.0).unwrap();
    assert!(matches!(engine.join_ranks(), Err(Error::PendingGradients)));
}
