//! Weights of 8 bits: one number per meaning, whatever the company, the layout and the ranks; and what is refused.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use tandem_collective::{Collective, Solo};
use tandem_engine::generate::{CacheSize, Completion, Request, SamplingKey, generate};
use tandem_engine::model::Blueprint;
use tandem_engine::model::unit::{DOWN, Head, UnitId};
use tandem_engine::parallel::{ParallelConfig, Placement, ZeroStage};
use tandem_engine::{Engine, Model, Packed, Precision, SwitchConfig, WeightFormat};
use tandem_kernels::sample::SamplingParams;

use crate::ranks::on_ranks;
use crate::toy::{Layout, engine, rows, spec, train, weight_bits};

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

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Log-probabilities of all tokens but the first of each sequence.
fn scored(model: &Model, sequences: &[Vec<u32>]) -> Vec<f32> {
    let batch = Packed::from_sequences(sequences);
    let (mut rows, mut labels, mut start) = (Vec::new(), Vec::new(), 0);
    for ids in sequences {
        rows.extend(start..start + ids.len() as u32 - 1);
        labels.extend_from_slice(&ids[1..]);
        start += ids.len() as u32;
    }
    model.log_probs(&batch, &rows, &labels).unwrap().logp.to_vec1().unwrap()
}

/// What a model says of the tokens of an answer.
fn own(model: &Model, completion: &Completion) -> Vec<f32> {
    let prompt = &requests()[completion.request].prompt;
    let sequence = [prompt.as_slice(), &completion.ids].concat();
    scored(model, &[sequence])[prompt.len() - 1..].to_vec()
}

fn frozen(layout: &Layout, world: &Arc<dyn Collective>) -> Placement {
    Placement { is_frozen: true, weights: WeightFormat::Int8, ..layout.placement(world).unwrap() }
}

fn layout(world: usize, stage: ZeroStage, config: ParallelConfig) -> Layout {
    Layout { precision: Precision::Bf16, ..Layout::of(world, stage, config) }
}

#[test]
fn what_is_sampled_is_what_is_scored_in_any_company() {
    for gated in [true, false] {
        let model = Model::initial(spec(gated), Head::Language, 7).unwrap();
        let model = model.frozen(Precision::Bf16, WeightFormat::Int8).unwrap();
        assert_eq!((model.precision(), model.weight_format()), (Precision::Bf16, WeightFormat::Int8));
        // Decoding, one row for each of three sequences, and a forward of one sequence.
        for completion in generate(&model, &requests(), 3, 16, KEY, &mut |_, _, _| {}).unwrap() {
            assert_eq!(bits(&own(&model, &completion)), bits(&completion.logp), "sample {}", completion.sample);
        }
        let all = rows(3, 9);
        let apart: Vec<f32> = all.iter().flat_map(|one| scored(&model, std::slice::from_ref(one))).collect();
        assert_eq!(bits(&scored(&model, &all)), bits(&apart), "together and one by one");
        assert_eq!(bits(&scored(&model.duplicate().unwrap(), &all)), bits(&apart));
        // What it multiplies with is a model, of which 8 bits change nothing.
        let units = model.units().unwrap();
        let again = Model::from_parts(spec(gated), Head::Language, units).unwrap();
        assert!(bits(&scored(&again, &all)) != bits(&apart), "f32 is not bf16");
        let again = again.frozen(Precision::Bf16, WeightFormat::Int8).unwrap();
        assert_eq!(bits(&scored(&again, &all)), bits(&apart));
    }
}

/// The scale of a row is that of the whole row, so cuts and ranks change no integer; and the order of sums is that of the lanes.
#[test]
fn frozen_models_say_the_same_on_any_ranks() {
    let all = rows(3, 5);
    for gated in [true, false] {
        for tensor_lanes in [1, 2, 4] {
            let config = ParallelConfig { tensor_lanes, ..ParallelConfig::default() };
            let blueprint = || Blueprint::initial(spec(gated), Head::Language, 7);
            let run = |layout: Layout| {
                let found = on_ranks(layout.world, |world| {
                    let model = blueprint().place(&frozen(&layout, &world)).unwrap();
                    let laid_out = match model.generates_in_place() {
                        true => model.clone(),
                        false => model.inference_copy(None, 2, model.weight_format()).unwrap().0,
                    };
                    let answers = generate(&laid_out, &requests(), 3, 16, KEY, &mut |_, _, _| {}).unwrap();
                    let answers: Vec<_> =
                        answers.iter().map(|answer| (answer.ids.clone(), bits(&answer.logp))).collect();
                    (bits(&scored(&model, &all)), answers, weight_bits(&model).unwrap())
                });
                assert!(found.iter().all(|rank| (&rank.0, &rank.1) == (&found[0].0, &found[0].1)), "{layout:?}");
                found[0].clone()
            };
            let expected = run(layout(1, ZeroStage::Zero, config));
            let whole = Model::initial(spec(gated), Head::Language, 7).unwrap();
            let whole = whole.frozen(Precision::Bf16, WeightFormat::Int8).unwrap();
            // Beside the matrices, bf16 numbers: equal as f32 numbers.
            assert!(expected.2 == weight_bits(&whole).unwrap(), "{tensor_lanes} pieces have other integers");
            for (world, tensor, pipeline, inference_tensor) in
                [(2, 1, 1, 1), (2, 2, 1, 2), (2, 1, 2, 1), (4, 2, 2, 1), (4, 4, 1, 4), (4, 2, 1, 4)]
            {
                if tensor.max(inference_tensor) > tensor_lanes {
                    continue;
                }
                let config = ParallelConfig { tensor, pipeline, inference_tensor, ..config };
                let found = run(layout(world, ZeroStage::Zero, config));
                assert!(found == expected, "{world} ranks, {config:?}");
            }
        }
    }
}

/// A copy in 8 bits samples; what it records are its own log-probabilities, near those of the model that is trained, and the
/// model is none the wiser.
#[test]
fn rollouts_in_8_bits_are_those_of_one_rank() {
    let switching = SwitchConfig { weights: WeightFormat::Int8, gather_units: 2, ..SwitchConfig::default() };
    for tensor_lanes in [1, 2] {
        let config = ParallelConfig { data_lanes: 4, tensor_lanes, ..ParallelConfig::default() };
        let run = |layout: Layout| {
            let found = on_ranks(layout.world, |world| {
                let engine = engine(&spec(true), &layout.placement(&world).unwrap()).unwrap();
                let mut engine = engine.switching(switching);
                let mut answers = Vec::new();
                for _ in 0..2 {
                    train(&mut engine, &layout, 1, 9).unwrap();
                    let before = weight_bits(engine.model()).unwrap();
                    let (mut generating, report) = engine.into_generate(SIZE).unwrap();
                    assert!(report.allocated_bytes > 0);
                    let copy = generating.inference_model().clone();
                    assert_eq!(copy.weight_format(), WeightFormat::Int8);
                    let completions = generating.generate(&requests(), KEY, 16, &mut |_, _, _| {}).unwrap();
                    for completion in &completions {
                        assert_eq!(bits(&own(&copy, completion)), bits(&completion.logp), "the copy's own");
                        let trained = own(generating.model(), completion);
                        let gap = |(a, b): (&f32, &f32)| f64::from((a - b).abs());
                        let gap: f64 =
                            trained.iter().zip(&completion.logp).map(gap).sum::<f64>() / trained.len() as f64;
                        // Log-probabilities are about 7; a thousandth of that is what 8 bits cost here.
                        assert!(gap > 0.0 && gap < 0.05, "{gap} nats from the model that is trained");
                    }
                    answers.push(completions.iter().map(|c| (c.ids.clone(), bits(&c.logp))).collect::<Vec<_>>());
                    engine = generating.into_train().unwrap().0;
                    assert!(weight_bits(engine.model()).unwrap() == before);
                }
                answers
            });
            assert!(found.iter().all(|rank| *rank == found[0]), "{layout:?}");
            found[0].clone()
        };
        let expected = run(layout(1, ZeroStage::Zero, config));
        assert!(expected[0] != expected[1], "the copy follows the model");
        for (world, stage, tensor, inference_tensor) in [
            (2, ZeroStage::Three, 1, 1),
            (2, ZeroStage::Three, 1, 2),
            (2, ZeroStage::One, 2, 2),
            (4, ZeroStage::Three, 2, 1),
        ] {
            if tensor.max(inference_tensor) > tensor_lanes {
                continue;
            }
            let config = ParallelConfig { tensor, inference_tensor, ..config };
            assert!(run(layout(world, stage, config)) == expected, "{world} {stage:?} {config:?}");
        }
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let solo: Arc<dyn Collective> = Arc::new(Solo::new());
    let model = || Model::initial(spec(true), Head::Language, 7).unwrap();
    let error = model().frozen(Precision::F32, WeightFormat::Int8).unwrap_err().to_string();
    assert!(error.contains("8 bits") && error.contains("bf16"), "{error}");
    let config = ParallelConfig::default();
    let wide = Placement { precision: Precision::F32, ..frozen(&layout(1, ZeroStage::Zero, config), &solo) };
    // Before any unit is made.
    let never = || Blueprint::new(spec(true), Head::Language, |_| panic!("a unit was made"));
    assert!(never().place(&wide).unwrap_err().to_string().contains("bf16"));
    on_ranks(2, |world| {
        let sliced = frozen(&layout(2, ZeroStage::Three, config), &world);
        let error = never().place(&sliced).unwrap_err().to_string();
        assert!(error.contains("whole") && error.contains("zero_stage"), "{error}");
    });
    let switching = SwitchConfig { weights: WeightFormat::Int8, ..SwitchConfig::default() };
    let wide = engine(&spec(true), &Placement::solo()).unwrap().switching(switching);
    assert!(wide.into_generate(SIZE).unwrap_err().to_string().contains("bf16"));

    for bad in [f32::NAN, f32::INFINITY] {
        let damaged = Blueprint::initial(spec(true), Head::Language, 7).amended(UnitId::Block(1), move |unit| {
            let down = unit.get(DOWN)?;
            let width = down.dims()[1];
            let row = Tensor::full(bad, (1, width), &Device::Cpu)?;
            Ok(down.slice_set(&row, 0, 2)?)
        });
        for tensor_lanes in [1, 2] {
            let config = ParallelConfig { tensor_lanes, ..config };
            let error = damaged.place(&frozen(&layout(1, ZeroStage::Zero, config), &solo)).unwrap_err().to_string();
            for part in ["row 2", DOWN, "block.1"] {
                assert!(error.contains(part), "{part} is not in: {error}");
            }
        }
    }
    // It can be asked, not trained.
    let int8 = model().frozen(Precision::Bf16, WeightFormat::Int8).unwrap();
    let mut engine = Engine::new(int8, crate::toy::optimizer()).unwrap();
    let batch = Packed::from_sequences([[1u32, 2, 3]]);
    let error = engine.accumulate_log_probs(&batch, &[0], &[2], None, tandem_engine::Recompute::Off, |out| {
        crate::toy::negative_sum(out)
    });
    assert!(error.unwrap_err().to_string().contains("8 bits"));
}
