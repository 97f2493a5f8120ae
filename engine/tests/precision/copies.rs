//! What passes compute with follows the master weights: after every way to change them, an engine does what a fresh model of
//! its weights does, bit for bit.

use tandem_collective::Solo;
use tandem_engine::generate::{CacheSize, Completion, KvCache, Request, SamplingKey, Scheduler, generate};
use tandem_engine::model::unit::{Head, UnitBuffer};
use tandem_engine::parallel::{ParallelConfig, ZeroStage};
use tandem_engine::train::Ema;
use tandem_engine::{Engine, Model, Packed, Precision, SwitchConfig, Train, WeightFormat};
use tandem_kernels::sample::SamplingParams;

use crate::ranks::on_ranks;
use crate::toy::{Layout, engine, rows, spec, train};

const KEY: SamplingKey = SamplingKey { seed: 3, step: 1 };
const SIZE: CacheSize = CacheSize { slots: 3, max_len: 40 };

fn requests() -> Vec<Request> {
    let request = |index: usize| Request {
        prompt: (0..1 + 5 * index as u32).map(|at| (at * 97 + 31 * index as u32) % 1100).collect(),
        samples: vec![2 * index as u64, 2 * index as u64 + 1],
        max_new_tokens: 6 + index,
        stop: vec![5],
        sampling: SamplingParams::default(),
    };
    (0..5).map(request).collect()
}

/// What models say: sampled tokens with the bits of their log-probabilities, and the bits of those of given rows.
#[derive(Debug, PartialEq)]
struct Said {
    sampled: Vec<(Vec<u32>, Vec<u32>)>,
    scored: Vec<u32>,
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn said(model: &Model, completions: &[Completion]) -> Said {
    let all = rows(99, 6);
    let batch = Packed::from_sequences(&all);
    let targets: Vec<u32> = (0..batch.tokens() as u32).collect();
    let logp = model.log_probs(&batch, &targets, &batch.ids).unwrap().logp;
    let sampled = completions.iter().map(|completion| (completion.ids.clone(), bits(&completion.logp))).collect();
    Said { sampled, scored: bits(&logp.to_vec1::<f32>().unwrap()) }
}

fn whole(model: &Model) -> Vec<UnitBuffer> {
    (0..=model.spec().layers).filter_map(|index| model.whole_unit(index).unwrap()).collect()
}

/// A model of these master weights that has never computed before, on one rank.
fn fresh(units: &[UnitBuffer], gated: bool, layout: &Layout) -> Model {
    let units = units.iter().map(|unit| unit.duplicate().unwrap()).collect();
    let config = ParallelConfig { tensor: 1, pipeline: 1, inference_tensor: 1, ..layout.config };
    let alone = Layout { config, ..Layout { stage: ZeroStage::Zero, ..*layout } };
    let solo: std::sync::Arc<dyn tandem_collective::Collective> = std::sync::Arc::new(Solo::new());
    let model = Model::from_parts(spec(gated), Head::Language, units).unwrap();
    model.place(&alone.placement(&solo).unwrap()).unwrap()
}

fn switched(engine: Engine<Train>) -> (Engine<Train>, Vec<Completion>) {
    let (mut generating, _) = engine.into_generate(SIZE).unwrap();
    let completions = generating.generate(&requests(), KEY, 16, &mut |_, _, _| {}).unwrap();
    (generating.into_train().unwrap().0, completions)
}

#[test]
fn an_engine_says_what_a_fresh_model_of_its_weights_says() {
    let kept = SwitchConfig {
        release_inference_cache: false,
        pin_parameters: true,
        gather_units: 2,
        ..SwitchConfig::default()
    };
    let layouts = [
        (1, ZeroStage::Zero, 1, 1, 0),
        (2, ZeroStage::Zero, 1, 1, 0),
        (2, ZeroStage::One, 1, 1, 0),
        (2, ZeroStage::Two, 1, 2, 0),
        (2, ZeroStage::Zero, 2, 1, 0),
        (2, ZeroStage::Three, 1, 2, 0),
        // Units that stay together once they are gathered.
        (2, ZeroStage::Three, 1, 1, 1 << 20),
        (4, ZeroStage::Three, 2, 2, 1 << 12),
    ];
    for gated in [true, false] {
        for (world, stage, tensor, inference_tensor, persistence_threshold) in layouts {
            for switching in [SwitchConfig::default(), kept] {
                let tensor_lanes = tensor.max(inference_tensor);
                let config = ParallelConfig {
                    data_lanes: 4,
                    tensor_lanes,
                    tensor,
                    inference_tensor,
                    ..ParallelConfig::default()
                };
                let layout =
                    Layout { precision: Precision::Bf16, persistence_threshold, ..Layout::of(world, stage, config) };
                on_ranks(world, |ranks| {
                    let placement = layout.placement(&ranks).unwrap();
                    let mut engine = engine(&spec(gated), &placement).unwrap().switching(switching);
                    let mut before = None;
                    for _ in 0..3 {
                        train(&mut engine, &layout, 1, 9).unwrap();
                        let (back, completions) = switched(engine);
                        engine = back;
                        let found = said(engine.model(), &completions);
                        let units = whole(engine.model());
                        if ranks.rank() == 0 {
                            let model = fresh(&units, gated, &layout);
                            let completions = generate(&model, &requests(), 3, 16, KEY, &mut |_, _, _| {}).unwrap();
                            assert!(found == said(&model, &completions), "{layout:?} {switching:?}");
                        }
                        assert!(before.as_ref() != Some(&found), "{layout:?}: a step has changed nothing");
                        before = Some(found);
                    }
                });
            }
        }
    }
}

/// An average of weights is a model in the format of the one that it follows.
#[test]
fn an_average_says_what_a_fresh_model_of_it_says() {
    for (world, stage) in [(1, ZeroStage::Zero), (2, ZeroStage::One), (2, ZeroStage::Three)] {
        let config = ParallelConfig { data_lanes: 4, ..ParallelConfig::default() };
        let layout = Layout { precision: Precision::Bf16, ..Layout::of(world, stage, config) };
        on_ranks(world, |ranks| {
            let placement = layout.placement(&ranks).unwrap();
            let mut engine = engine(&spec(true), &placement).unwrap();
            let mut ema = Ema::new(engine.model(), 0.9, &placement).unwrap();
            for _ in 0..2 {
                train(&mut engine, &layout, 1, 9).unwrap();
                ema.update(engine.model()).unwrap();
                let average = ema.model(engine.model()).unwrap();
                assert_eq!(average.precision(), Precision::Bf16);
                let (found, units) = (said(&average, &[]), whole(&average));
                if ranks.rank() == 0 {
                    assert!(found == said(&fresh(&units, true, &layout), &[]), "{layout:?}");
                }
            }
        });
    }
}

/// Matrices packed beside the weights are the weights: the same bits with them and without.
#[test]
fn packed_matrices_change_no_bit() {
    for gated in [true, false] {
        for precision in [Precision::F32, Precision::Bf16] {
            for tensor_lanes in [1, 2] {
                let config = ParallelConfig { tensor_lanes, ..ParallelConfig::default() };
                let layout = Layout { precision, ..Layout::of(1, ZeroStage::Zero, config) };
                let units = Model::initial(spec(gated), Head::Language, 7).unwrap().units().unwrap();
                let model = fresh(&units, gated, &layout);
                let packed = generate(&model, &requests(), 3, 16, KEY, &mut |_, _, _| {}).unwrap();
                let cache = KvCache::new(&model, SIZE).unwrap();
                assert_eq!(cache.size_bytes(), SIZE.bytes(model.spec(), precision));
                let plain = Scheduler::new(&model, &cache, KEY, 16).run(&requests(), &mut |_, _, _| {}).unwrap();
                assert!(said(&model, &packed) == said(&model, &plain), "{precision:?}, {tensor_lanes} pieces");
            }
        }
    }
}

/// A model that is not trained needs no master weights to say the same.
#[test]
fn a_frozen_model_says_what_a_trained_one_says() {
    for gated in [true, false] {
        let model = || Model::initial(spec(gated), Head::Language, 7).unwrap();
        let trained = model().with_precision(Precision::Bf16).unwrap();
        let frozen = model().frozen(Precision::Bf16, WeightFormat::Precision).unwrap();
        let copy = frozen.duplicate().unwrap();
        let answers = |model: &Model| generate(model, &requests(), 3, 16, KEY, &mut |_, _, _| {}).unwrap();
        let expected = said(&trained, &answers(&trained));
        for model in [&frozen, &copy] {
            assert_eq!(model.precision(), Precision::Bf16);
            assert!(said(model, &answers(model)) == expected);
        }
        let f32 = model().frozen(Precision::F32, WeightFormat::Precision).unwrap();
        assert!(said(&f32, &[]).scored != expected.scored);
    }
}
