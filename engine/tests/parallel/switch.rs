//! Switching between the layouts of training and generation.

use tandem_engine::generate::{CacheSize, Completion, Request, SamplingKey};
use tandem_engine::model::spec::ModelSpec;
use tandem_engine::model::unit::{Cut, Head, UnitLayout};
use tandem_engine::parallel::{Mesh, Parallel, ParallelConfig, Slicing, ZeroStage};
use tandem_engine::{Engine, Packed, Precision, SwitchConfig, Train};
use tandem_kernels::sample::SamplingParams;

use crate::ranks::on_ranks;
use crate::toy::{Layout, engine, spec, train, weight_bits};

const KEY: SamplingKey = SamplingKey { seed: 3, step: 1 };
const SIZE: CacheSize = CacheSize { slots: 3, max_len: 40 };

/// Prompts of mixed lengths, and every way to choose tokens.
fn requests() -> Vec<Request> {
    let plain = SamplingParams::default();
    let ways = [
        plain,
        SamplingParams::greedy(),
        SamplingParams { temperature: 0.7, repetition_penalty: 1.3, ..plain },
        SamplingParams { top_k: 20, ..plain },
        SamplingParams { top_p: 0.8, ..plain },
        SamplingParams { min_p: 0.2, ..plain },
    ];
    let request = |(index, sampling): (usize, SamplingParams)| Request {
        prompt: (0..1 + 4 * index as u32).map(|at| (at * 97 + 31 * index as u32) % 1100).collect(),
        samples: vec![2 * index as u64, 2 * index as u64 + 1],
        max_new_tokens: 6 + index,
        stop: vec![5],
        sampling,
    };
    ways.into_iter().enumerate().map(request).collect()
}

/// Tokens, and the bits of their log-probabilities.
type Bits = (Vec<u32>, Vec<u32>, Vec<u32>);

fn bits(completions: &[Completion]) -> Vec<Bits> {
    let of = |c: &Completion| {
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect();
        (c.ids.clone(), bits(&c.logp), bits(&c.sampling_logp))
    };
    completions.iter().map(of).collect()
}

/// Generates, and checks in both modes that the recorded log-probabilities are those of the model.
fn rollout(engine: Engine<Train>) -> (Engine<Train>, Vec<Completion>) {
    let requests = requests();
    let (mut generating, _) = engine.into_generate(SIZE).unwrap();
    let completions = generating.generate(&requests, KEY, 16, &mut |_, _, _| {}).unwrap();
    let (engine, _) = generating.into_train().unwrap();
    for completion in &completions {
        let prompt = &requests[completion.request].prompt;
        let batch = Packed::from_sequences([[prompt.as_slice(), &completion.ids].concat()]);
        let first = prompt.len() as u32 - 1;
        let rows: Vec<u32> = (first..first + completion.ids.len() as u32).collect();
        let out = engine.log_probs(&batch, &rows, &completion.ids).unwrap();
        assert_eq!(out.logp.to_vec1::<f32>().unwrap(), completion.logp, "trained and recorded log-probabilities");
    }
    (engine, completions)
}

#[test]
fn rollouts_are_those_of_one_rank() {
    rollouts_equal_those_of_one_rank(Precision::F32);
}

#[test]
fn rollouts_are_those_of_one_rank_in_bf16() {
    rollouts_equal_those_of_one_rank(Precision::Bf16);
}

fn rollouts_equal_those_of_one_rank(precision: Precision) {
    for gated in [true, false] {
        for tensor_lanes in [1, 2, 4] {
            let config = ParallelConfig { data_lanes: 4, tensor_lanes, ..ParallelConfig::default() };
            let run = |layout: Layout| {
                let all = on_ranks(layout.world, |world| {
                    let mut engine = engine(&spec(gated), &layout.placement(&world).unwrap()).unwrap();
                    train(&mut engine, &layout, 2, 9).unwrap();
                    let (mut engine, first) = rollout(engine);
                    train(&mut engine, &layout, 1, 9).unwrap();
                    let (_, second) = rollout(engine);
                    [bits(&first), bits(&second)]
                });
                assert!(all.iter().all(|rank| *rank == all[0]), "{layout:?}: ranks have sampled different tokens");
                all[0].clone()
            };
            let expected = run(Layout { precision, ..Layout::of(1, ZeroStage::Zero, config) });
            for (world, stage, tensor, pipeline, inference_tensor) in [
                (2, ZeroStage::Zero, 1, 1, 1),
                (2, ZeroStage::Zero, 2, 1, 2),
                (2, ZeroStage::Three, 1, 1, 2),
                (4, ZeroStage::Three, 1, 1, 1),
                (4, ZeroStage::Three, 1, 1, 2),
                (4, ZeroStage::Three, 2, 1, 1),
                (4, ZeroStage::One, 2, 1, 4),
                (4, ZeroStage::Two, 1, 2, 2),
                (4, ZeroStage::Zero, 2, 2, 1),
                (4, ZeroStage::Three, 1, 1, 4),
            ] {
                if tensor > tensor_lanes || inference_tensor > tensor_lanes {
                    continue;
                }
                let config = ParallelConfig { tensor, pipeline, inference_tensor, ..config };
                let found = run(Layout { precision, ..Layout::of(world, stage, config) });
                assert!(found == expected, "{world} {stage:?} {config:?}");
            }
        }
    }
}

#[test]
fn a_thousand_switches_change_no_bit() {
    switches_change_no_bit(Precision::F32, 1000);
}

#[test]
fn a_hundred_switches_change_no_bit_in_bf16() {
    switches_change_no_bit(Precision::Bf16, 100);
}

/// The bits of both moments.
fn moment_bits(engine: &Engine<Train>) -> Vec<u32> {
    let optimizer = engine.optimizer();
    let slices = optimizer.first_moments().iter().chain(optimizer.second_moments());
    slices.flat_map(|slice| slice.iter().map(|value| value.to_bits())).collect()
}

fn switches_change_no_bit(precision: Precision, switches: usize) {
    let kept = SwitchConfig {
        release_inference_cache: false,
        pin_parameters: true,
        gather_units: 1,
        ..SwitchConfig::default()
    };
    for (stage, switching) in [(ZeroStage::Three, SwitchConfig::default()), (ZeroStage::One, kept)] {
        let config = ParallelConfig { inference_tensor: 2, ..ParallelConfig::default() };
        let layout = Layout { precision, ..Layout::of(2, stage, config) };
        on_ranks(2, |world| {
            let mut engine = engine(&spec(true), &layout.placement(&world).unwrap()).unwrap().switching(switching);
            train(&mut engine, &layout, 1, 5).unwrap();
            let before = weight_bits(engine.model()).unwrap();
            let moments = moment_bits(&engine);
            for switch in 0..switches {
                let (generating, to_generate) = engine.into_generate(SIZE).unwrap();
                let copy: usize = generating.inference_model().layouts().iter().map(|layout| layout.len()).sum();
                // The two ranks that generate together share the heads of the cache.
                let cache = SIZE.bytes(&spec(true), precision) / 2;
                let needed = (precision.bytes() * copy + cache) as u64;
                let (back, _) = generating.into_train().unwrap();
                engine = back;
                let allocates = switch == 0 || !switching.pin_parameters;
                assert_eq!(to_generate.allocated_bytes, if allocates { needed } else { 0 }, "switch {switch}");
            }
            assert!(weight_bits(engine.model()).unwrap() == before);
            assert!(moment_bits(&engine) == moments);
        });
    }
}

/// The common elements of a unit that a rank holds in training.
fn held(spec: &ModelSpec, mesh: &Mesh, stage: ZeroStage, lanes: usize, rank: usize, unit: usize) -> Vec<bool> {
    let id = UnitLayout::all(spec, Head::Language)[unit].id;
    let whole = UnitLayout::cut(spec, Head::Language, id, &Cut::whole(lanes));
    let at = mesh.coordinates(rank);
    let cut = Cut::share(lanes, mesh.tensor, at.tensor).unwrap();
    let layout = UnitLayout::cut(spec, Head::Language, id, &cut);
    let slice = match stage {
        ZeroStage::Three => Slicing { len: layout.len(), ranks: mesh.data }.range(at.data),
        _ => 0..layout.len(),
    };
    let mut held = vec![false; whole.len()];
    for section in &layout.sections {
        for offset in 0..section.len {
            if slice.contains(&(section.start + offset)) {
                held[section.common_start + offset] = true;
            }
        }
    }
    held
}

#[test]
fn a_switch_moves_no_byte_that_need_not_move() {
    for (world, stage, tensor, inference_tensor) in [
        (2, ZeroStage::Three, 1, 2),
        (4, ZeroStage::Three, 1, 2),
        (4, ZeroStage::Three, 1, 1),
        (4, ZeroStage::Three, 2, 4),
        (4, ZeroStage::Zero, 1, 4),
        (4, ZeroStage::Zero, 4, 1),
    ] {
        let config = ParallelConfig { tensor, inference_tensor, tensor_lanes: 4, ..ParallelConfig::default() };
        let layout = Layout::of(world, stage, config);
        let spec = spec(true);
        let reports = on_ranks(world, |world| {
            let engine = engine(&spec, &layout.placement(&world).unwrap()).unwrap();
            let (generating, report) = engine.into_generate(SIZE).unwrap();
            let parallel: &Parallel = generating.model().parallel();
            (parallel.world.rank(), report.moved_bytes)
        });
        let mesh = Mesh::new(world, tensor, 1).unwrap();
        for (rank, moved) in reports {
            let cut = Cut::share(4, inference_tensor, rank % inference_tensor).unwrap();
            let mut lacking = 0;
            for (unit, layout) in UnitLayout::all_cut(&spec, Head::Language, &cut).iter().enumerate() {
                let held = held(&spec, &mesh, stage, 4, rank, unit);
                for section in &layout.sections {
                    let needed = section.common_start..section.common_start + section.len;
                    lacking += held[needed].iter().filter(|&&held| !held).count();
                }
            }
            assert_eq!(moved, 4 * lacking as u64, "{world} {stage:?} {tensor} {inference_tensor}, rank {rank}");
        }
    }
}
