//! A run that was cut off goes on as if it had not been.

use std::path::Path;

use tandem_engine::checkpoint::{load_engine, save_engine};
use tandem_engine::model::unit::Head;
use tandem_engine::parallel::ZeroStage;
use tandem_engine::train::{OptimizerConfig, OptimizerKind};
use tandem_engine::{Engine, Train};
use tandem_store::{Published, RunDir};

use crate::ranks::on_ranks;
use crate::toy::{KINDS, ONE_BIT, VOTES, ZERO_ONE, bits, config, engine, placement, spec, step, weights};

const STEPS: u64 = 26;

fn settings(kind: OptimizerKind) -> OptimizerConfig {
    config(kind, 4e-3, STEPS)
}

/// What a rank has come to: weights and first moments.
fn state(engine: &Engine<Train>) -> Vec<u32> {
    let moments = engine.optimizer().first_moments().iter().map(|unit| unit.to_vec()).collect::<Vec<_>>();
    [bits(&weights(engine)), bits(&moments)].concat()
}

/// Trains on `world` ranks to the step `at` and writes a checkpoint there; returns each rank's weights.
fn save(kind: OptimizerKind, world: usize, at: u64, dir: &Path) -> (Published, Vec<Vec<Vec<f32>>>) {
    let run = RunDir::open(dir).unwrap();
    let weights = on_ranks(world, |ranks| {
        let mut engine = engine(settings(kind), &placement(&ranks, ZeroStage::Zero, 1)).unwrap();
        (0..at).for_each(|_| assert!(step(&mut engine).unwrap().1.applied));
        let before = state(&engine);
        let mut staging = (ranks.rank() == 0).then(|| run.checkpoints().stage(at).unwrap());
        save_engine(&engine, "model", staging.as_mut()).unwrap();
        if let Some(staging) = staging {
            staging.publish(serde_json::json!({})).unwrap();
        }
        assert_eq!(state(&engine), before, "saving changes nothing");
        weights(&engine)
    });
    (run.checkpoints().open(at).unwrap().unwrap(), weights)
}

fn resume(kind: OptimizerKind, world: usize, checkpoint: &Published, steps: u64) -> Vec<(Vec<u32>, Vec<f64>)> {
    on_ranks(world, |ranks| {
        let placement = placement(&ranks, ZeroStage::Zero, 1);
        let mut engine = load_engine(&spec(), Head::Language, settings(kind), "model", checkpoint, &placement).unwrap();
        let losses = (0..steps).map(|_| step(&mut engine).unwrap().0).collect();
        (state(&engine), losses)
    })
}

#[test]
fn a_resumed_run_equals_one_that_was_not_cut_off() {
    for kind in [KINDS.as_slice(), &[OptimizerKind::AdamW]].concat() {
        for world in [1, 2, 4] {
            let whole = on_ranks(world, |ranks| {
                let mut engine = engine(settings(kind), &placement(&ranks, ZeroStage::Zero, 1)).unwrap();
                (0..STEPS).for_each(|_| assert!(step(&mut engine).unwrap().1.applied));
                state(&engine)
            });
            // In the warm-up, at the freeze and after it, at an exchange and between two.
            for at in [3, 6, 9, 10, 18, 19, 20] {
                let dir = tempfile::tempdir().unwrap();
                let (checkpoint, _) = save(kind, world, at, dir.path());
                let resumed = resume(kind, world, &checkpoint, STEPS - at);
                for (rank, (state, _)) in resumed.iter().enumerate() {
                    assert!(*state == whole[rank], "{kind:?}, rank {rank} of {world} from step {at}");
                }
            }
        }
    }
}

#[test]
fn another_number_of_ranks_starts_without_what_was_not_told() {
    for kind in KINDS {
        for (from, to) in [(2, 4), (4, 2), (4, 1), (1, 2)] {
            let dir = tempfile::tempdir().unwrap();
            let (checkpoint, _) = save(kind, from, 19, dir.path());
            let loaded = resume(kind, to, &checkpoint, 0);
            assert!(loaded.iter().all(|rank| rank.0 == loaded[0].0), "{kind:?}: all ranks start from the same");
            let trained = resume(kind, to, &checkpoint, 7);
            let is_apart = matches!(kind, OptimizerKind::ZeroOneAdam { .. } | OptimizerKind::SignSgd { .. });
            assert!(is_apart || trained.iter().all(|rank| rank.0 == trained[0].0), "{kind:?}: {from} to {to}");
            assert!(trained.iter().flat_map(|(_, losses)| losses).all(|loss| loss.is_finite()));
        }
    }
}

#[test]
fn weights_between_exchanges_are_saved_as_all_ranks_had_them_last() {
    let dir = tempfile::tempdir().unwrap();
    // Step 18 is an exchange, 19 and 20 are not.
    let (_, at_exchange) = save(ZERO_ONE, 2, 18, dir.path());
    let dir = tempfile::tempdir().unwrap();
    let (checkpoint, apart) = save(ZERO_ONE, 2, 20, dir.path());
    assert!(bits(&apart[0]) != bits(&apart[1]) && bits(&at_exchange[0]) == bits(&at_exchange[1]));
    let alone = on_ranks(1, |ranks| {
        let placement = placement(&ranks, ZeroStage::Zero, 1);
        let config = settings(ZERO_ONE);
        bits(&weights(&load_engine(&spec(), Head::Language, config, "model", &checkpoint, &placement).unwrap()))
    });
    assert_eq!(alone[0], bits(&at_exchange[0]));
}

#[test]
fn only_what_is_needed_is_saved() {
    let has = |kind, at, name: &str| {
        let dir = tempfile::tempdir().unwrap();
        save(kind, 2, at, dir.path()).0.contains(name)
    };
    assert!(!has(ONE_BIT, 6, "model-errors.safetensors"), "nothing is left untold before the freeze");
    assert!(has(ONE_BIT, 7, "model-errors.safetensors"));
    assert!(has(VOTES, 1, "model-errors.safetensors"), "every rank has its own momentum");
    assert!(!has(VOTES, 1, "model-second.safetensors"));
    assert!(!has(OptimizerKind::AdamW, 7, "model-errors.safetensors"));
}
