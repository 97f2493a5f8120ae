//! Every kind does, bit for bit, what its paper says.

use tandem_engine::generate::CacheSize;
use tandem_engine::parallel::ZeroStage;
use tandem_engine::train::OptimizerKind;

use crate::ranks::on_ranks;
use crate::toy::{
    KINDS, ONE_BIT, VOTES, ZERO_ONE, accumulate, bits, config, engine, gradient, placement, step, terms, weights,
};
use crate::twin::{Twin, tree};

const STEPS: u64 = 30;
/// Some gradients are longer, some shorter.
const LIMIT: f64 = 1.2;

/// What one rank has had and come to in one step, by unit.
struct Step {
    grads: Vec<Vec<f32>>,
    norm: f64,
    weights: Vec<Vec<f32>>,
}

fn check(kind: OptimizerKind, world: usize, stage: ZeroStage, lanes: usize) {
    let what = format!("{kind:?} on {world} ranks with {lanes} lanes each, {stage:?}");
    // The last steps have a learning rate of 0.
    let config = tandem_engine::train::OptimizerConfig { max_grad_norm: LIMIT, ..config(kind, 4e-3, STEPS - 6) };
    let ranks = on_ranks(world, |ranks| {
        let mut engine = engine(config, &placement(&ranks, stage, lanes)).unwrap();
        let layouts = engine.model().layouts();
        let decays = layouts.iter().map(|layout| {
            let ranges = layout.decay_ranges().into_iter();
            ranges.flat_map(|(range, decays)| vec![decays; range.len()]).collect::<Vec<bool>>()
        });
        let (decays, start) = (decays.collect::<Vec<_>>(), weights(&engine));
        let steps = (1..=STEPS).map(|step| {
            accumulate(&mut engine, step, 1.0).unwrap();
            let grads = gradient(&engine);
            let outcome = engine.step(terms(step)).unwrap();
            assert!(outcome.applied);
            Step { grads, norm: outcome.grad_norm, weights: weights(&engine) }
        });
        (decays, start, steps.collect::<Vec<_>>())
    });
    let (decays, start, steps) = &ranks[0];
    let clipped = steps.iter().filter(|step| step.norm > LIMIT).count();
    assert!(clipped > 0 && clipped < steps.len(), "{what}: {clipped} steps are clipped");
    for unit in 0..start.len() {
        let mut twin = Twin::new(config, world, &start[unit], decays[unit].clone());
        for number in 0..STEPS as usize {
            let grads: Vec<Vec<f32>> = ranks.iter().map(|(_, _, steps)| steps[number].grads[unit].clone()).collect();
            let is_same = grads.iter().all(|grad| bits(std::slice::from_ref(grad)) == bits(&grads[..1]));
            assert_eq!(is_same, twin.adds_up() || world == 1, "{what}: gradients in step {}", number + 1);
            twin.step(&grads, terms(number as u64 + 1), steps[number].norm);
            for (rank, (_, _, steps)) in ranks.iter().enumerate() {
                let (found, expected) = (&steps[number].weights[unit], &twin.weights[rank]);
                let wrong = found.iter().zip(expected).position(|(a, b)| a.to_bits() != b.to_bits());
                let wrong = wrong.map(|i| (i, found[i], expected[i]));
                assert_eq!(wrong, None, "{what}: step {}, unit {unit}, rank {rank}", number + 1);
            }
        }
    }
}

#[test]
fn every_kind_is_its_twin() {
    for kind in KINDS {
        for world in [1, 2, 4] {
            check(kind, world, ZeroStage::Zero, 1);
        }
        check(kind, 3, ZeroStage::Zero, 1);
        check(kind, 2, ZeroStage::One, 2);
        check(kind, 1, ZeroStage::Zero, 4);
    }
}

#[test]
fn what_ranks_keep_to_themselves_adds_up_to_the_gradient() {
    for world in [1, 2, 4] {
        let ranks = on_ranks(world, |ranks| {
            [OptimizerKind::AdamW, VOTES].map(|kind| {
                let mut engine = engine(config(kind, 1e-3, 10), &placement(&ranks, ZeroStage::Zero, 1)).unwrap();
                accumulate(&mut engine, 1, 1.0).unwrap();
                let norm = engine.grad_norm(terms(1)).unwrap();
                (gradient(&engine).concat(), norm)
            })
        });
        let sum = &ranks[0][0].0;
        let worst = (0..sum.len()).map(|i| {
            let local: Vec<f32> = ranks.iter().map(|rank| rank[1].0[i]).collect();
            (tree(&local) - sum[i]).abs()
        });
        let largest = sum.iter().fold(0.0, |largest: f32, x| largest.max(x.abs()));
        // Rounds are added before ranks here, and after them there.
        assert!(worst.fold(0.0, f32::max) <= 1e-5 * largest, "{world} ranks");
        let squares = |grad: &[f32]| grad.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>();
        let local: f64 = ranks.iter().map(|rank| squares(&rank[1].0)).sum();
        for [(_, exact), (_, norm)] in &ranks {
            assert!((norm - local.sqrt() / terms(1)).abs() < 1e-9 * norm, "{world} ranks: {norm}");
            assert!(*norm <= exact * (world as f64).sqrt() && *norm >= exact / (world as f64).sqrt() * 0.999_999);
        }
    }
}

#[test]
fn ranks_never_drift() {
    for kind in KINDS {
        let ranks = on_ranks(4, |ranks| {
            let mut engine = engine(config(kind, 4e-3, 60), &placement(&ranks, ZeroStage::Zero, 1)).unwrap();
            let mut all = Vec::new();
            for _ in 0..50 {
                step(&mut engine).unwrap();
                all.push(bits(&weights(&engine)));
            }
            step(&mut engine).unwrap();
            let momenta = |engine: &tandem_engine::Engine<tandem_engine::Train>| {
                engine.optimizer().first_moments().iter().flat_map(|unit| unit.iter().map(|m| m.to_bits())).collect()
            };
            let before: Vec<u32> = momenta(&engine);
            engine.join_ranks().unwrap();
            let after: Vec<u32> = momenta(&engine);
            all.push(bits(&weights(&engine)));
            (all, before == after)
        });
        let is_same = |step: usize| ranks.iter().all(|(all, _)| all[step] == ranks[0].0[step]);
        let same = (0..50).filter(|&step| is_same(step)).count();
        if let OptimizerKind::ZeroOneAdam { .. } = kind {
            // 9 steps to the freeze, 13 at intervals of 1 and 2, then every third.
            let apart =
                (1..=50).filter(|&step| step > 13 && (step > 17 && step % 3 != 0 || step <= 17 && step % 2 != 0));
            assert_eq!(same, 50 - apart.count(), "ranks meet when the schedule says so");
            assert!(!is_same(49), "they are apart before they are joined");
        } else {
            assert_eq!(same, 50, "{kind:?}");
            assert!(ranks.iter().all(|(_, untouched)| *untouched), "{kind:?}: there is nothing to join");
        }
        assert!(is_same(50), "{kind:?}: joined ranks are together");
    }
}

#[test]
fn stage_one_keeps_what_stage_zero_keeps() {
    on_ranks(2, |ranks| {
        let engine = engine(config(ONE_BIT, 1e-3, 10), &placement(&ranks, ZeroStage::One, 1)).unwrap();
        let held: usize = engine.optimizer().second_moments().iter().map(|unit| unit.len()).sum();
        assert_eq!((held, engine.placement().stage), (engine.model().parameters(), ZeroStage::Zero));
    });
}

#[test]
fn generation_finds_ranks_together() {
    let ranks = on_ranks(2, |ranks| {
        let mut engine = engine(config(ZERO_ONE, 4e-3, 60), &placement(&ranks, ZeroStage::Zero, 1)).unwrap();
        (0..20).for_each(|_| assert!(step(&mut engine).unwrap().1.applied));
        let before = bits(&weights(&engine));
        let (engine, _) = engine.into_generate(CacheSize { slots: 1, max_len: 8 }).unwrap();
        let units = engine.inference_model().units().unwrap();
        (before, bits(&units.iter().map(|unit| unit.flat().to_vec1().unwrap()).collect::<Vec<_>>()))
    });
    assert!(ranks[0].0 != ranks[1].0, "step 20 is not an exchange");
    assert!(ranks[0].1 == ranks[1].1);
}
