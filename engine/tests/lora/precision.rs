//! Adapters of a base that computes in bf16: they are trained in f32, merged in f32 and rounded with the base once.

use candle_core::Tensor;
use tandem_engine::generate::{CacheSize, Request, SamplingKey};
use tandem_engine::model::unit::{Head, SCORE, UnitBuffer};
use tandem_engine::parallel::{Gradients, ParallelConfig, Placement, ZeroStage};
use tandem_engine::{Engine, LogProbs, LoraConfig, Model, Packed, Precision, Recompute, SwitchConfig};
use tandem_kernels::mlp::Activation;
use tandem_kernels::sample::SamplingParams;

use crate::adapted::{FAMILIES, adapted, all_bits, base, batch, bits, config};
use crate::ranks::on_ranks;
use crate::toy::{Layout, optimizer, spec, train};

const KEY: SamplingKey = SamplingKey { seed: 3, step: 1 };
const SIZE: CacheSize = CacheSize { slots: 3, max_len: 40 };

fn placement(precision: Precision) -> Placement {
    Placement { precision, ..Placement::solo() }
}

/// A golden model with adapters that do something.
fn model(family: &str, precision: Precision) -> Model {
    let placement = placement(precision);
    adapted(base(family).place(&placement).unwrap(), &config(3, 0.0), &placement).unwrap()
}

fn requests(vocabulary: usize) -> Vec<Request> {
    let request = |index: usize| Request {
        prompt: (0..1 + 3 * index).map(|at| ((at * 97 + 31 * index) % vocabulary) as u32).collect(),
        samples: vec![2 * index as u64, 2 * index as u64 + 1],
        max_new_tokens: 6 + index,
        stop: Vec::new(),
        sampling: SamplingParams::default(),
    };
    (0..5).map(request).collect()
}

fn logp_bits(out: &LogProbs) -> Vec<u32> {
    out.logp.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

/// Gradients of all adapters, and log-probabilities as training computes them.
fn gradients(model: &Model, recompute: Recompute) -> (Vec<UnitBuffer>, LogProbs) {
    let (batch, rows, labels) = batch(model.spec().vocab_size, &[9, 2, 30, 17]);
    let mut grads = Gradients::new(&Placement::solo(), &model.trained_layouts()).unwrap();
    let trace = model.trace(&batch, &rows, None, recompute).unwrap();
    let loss = |out: &LogProbs| Ok(out.logp.sum_all()?.neg()?);
    let (_, out) = trace.backward_log_probs(&labels, &mut grads, loss).unwrap().unwrap();
    (grads.in_place().unwrap().unwrap(), out)
}

#[test]
fn one_log_probability() {
    for family in FAMILIES {
        let model = model(family, Precision::Bf16);
        assert_eq!(model.precision(), Precision::Bf16);
        let (packed, rows, labels) = batch(model.spec().vocab_size, &[9, 2, 30, 17]);
        let scored = model.log_probs(&packed, &rows, &labels).unwrap();
        for recompute in [Recompute::Off, Recompute::On] {
            assert_eq!(logp_bits(&scored), logp_bits(&gradients(&model, recompute).1), "{family}: score and training");
        }

        // What is sampled from is the merged model.
        let requests = requests(model.spec().vocab_size);
        let mut engine = Engine::placed(model, optimizer(), placement(Precision::Bf16)).unwrap();
        let kept = SwitchConfig { pin_parameters: true, ..SwitchConfig::default() };
        engine = engine.switching(kept);
        for _ in 0..2 {
            let (mut generating, _) = engine.into_generate(SIZE).unwrap();
            let completions = generating.generate(&requests, KEY, 16, &mut |_, _, _| {}).unwrap();
            let merged = generating.inference_model();
            for (index, unit) in merged.units().unwrap().iter().enumerate() {
                let expected = generating.model().whole_unit(index).unwrap().unwrap().narrowed().unwrap();
                assert_eq!(bits(unit), bits(&expected.widened().unwrap()), "{family}: unit {index}");
            }
            let (mut all, mut rows, mut labels, mut recorded) = (Packed::new(), Vec::new(), Vec::new(), Vec::new());
            for completion in &completions {
                let prompt = &requests[completion.request].prompt;
                let first = all.tokens() + prompt.len() - 1;
                all.push(&[prompt.as_slice(), &completion.ids].concat(), completion.sample);
                rows.extend((first..first + completion.ids.len()).map(|row| row as u32));
                labels.extend_from_slice(&completion.ids);
                recorded.extend(completion.logp.iter().map(|value| value.to_bits()));
            }
            let scored = merged.log_probs(&all, &rows, &labels).unwrap();
            assert_eq!(recorded, logp_bits(&scored), "{family}: sampled and scored");
            engine = generating.into_train().unwrap().0;
            // One more step, and another merged model.
            let (packed, rows, labels) = batch(engine.model().spec().vocab_size, &[9, 2, 30, 17]);
            let loss = |out: &LogProbs| Ok(out.logp.sum_all()?.neg()?);
            engine.accumulate_log_probs(&packed, &rows, &labels, None, Recompute::Off, loss).unwrap();
            assert!(engine.step(54.0).unwrap().applied);
        }
    }
}

/// The gradient points where that of f32 points. Some 20 roundings of a block's forward and as many of its backward, each of
/// at most 2⁻⁸ and 0.4 of that on average, make a relative error of about √80 · 0.4 · 2⁻⁸ = 0.014 in two blocks, and a cosine of
/// 1 − 0.014² / 2. Queries and keys are reached through `P ∘ (dP − D)` alone, a difference of numbers that are nearly equal where
/// attention is nearly even, as it is in models with random weights: the error stays and the difference is several times
/// smaller. And a ReLU passes a gradient or not: an error moves some of its inputs across zero. So a relative error of 0.1 is
/// granted, and with a ReLU 0.2.
#[test]
fn gradients_are_nearly_those_of_f32() {
    for family in FAMILIES {
        let [wide, narrow] = [Precision::F32, Precision::Bf16].map(|precision| model(family, precision));
        let expected = gradients(&wide, Recompute::Off).0;
        let found = gradients(&narrow, Recompute::Off).0;
        for (expected, found) in expected.iter().zip(&found) {
            for slot in &expected.layout().params {
                let values = |unit: &UnitBuffer| -> Vec<f64> {
                    let flat = unit.get(slot.name).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
                    flat.into_iter().map(f64::from).collect()
                };
                let (a, b) = (values(expected), values(found));
                let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
                let difference: Vec<f64> = a.iter().zip(&b).map(|(a, b)| a - b).collect();
                let error = (dot(&difference, &difference) / dot(&a, &a)).sqrt();
                let most = if wide.spec().activation == Activation::Relu { 0.2 } else { 0.1 };
                assert!(error < most, "{family} {} {}: relative error {error}", expected.layout().id, slot.name);
            }
        }
    }
}

/// Adapters, merged weights and the norms of a run.
fn trained(layout: &Layout, gated: bool, lora: &LoraConfig) -> (Vec<u32>, Vec<u32>, Vec<u64>) {
    let mut all = on_ranks(layout.world, |world| {
        let placement = layout.placement(&world).unwrap();
        let base = Model::initial(spec(gated), Head::Language, 7).unwrap().place(&placement).unwrap();
        let model = adapted(base, lora, &placement).unwrap();
        let mut engine = Engine::placed(model, optimizer(), placement).unwrap();
        let norms = train(&mut engine, layout, 3, 13).unwrap();
        let model = engine.model();
        let adapters = all_bits(model, |index| model.whole_trained_unit(index));
        (adapters, all_bits(model, |index| model.whole_unit(index)), norms)
    });
    all.swap_remove(0)
}

#[test]
fn every_layout_equals_one_rank() {
    for gated in [true, false] {
        for tensor_lanes in [1, 2] {
            let lora = config(3, 0.2);
            let config = ParallelConfig { data_lanes: 4, tensor_lanes, ..ParallelConfig::default() };
            let precision = Precision::Bf16;
            let alone = Layout { precision, ..Layout::of(1, ZeroStage::Zero, config) };
            let expected = trained(&alone, gated, &lora);
            for (world, stage, tensor, pipeline) in [
                (2, ZeroStage::Zero, 1, 1),
                (2, ZeroStage::Three, 1, 1),
                (2, ZeroStage::One, 2, 1),
                (4, ZeroStage::Two, 1, 2),
                (4, ZeroStage::Three, 2, 1),
            ] {
                if tensor > tensor_lanes {
                    continue;
                }
                let config = ParallelConfig { tensor, pipeline, ..config };
                let recompute = if pipeline == 1 { Recompute::Off } else { Recompute::On };
                let layout = Layout { precision, recompute, ..Layout::of(world, stage, config) };
                assert!(trained(&layout, gated, &lora) == expected, "{layout:?}");
            }
        }
    }
}

/// The scalar head is trained along with adapters, from the master weights on.
#[test]
fn a_scalar_head_starts_where_the_masters_are() {
    for (world, stage) in [(1, ZeroStage::Zero), (2, ZeroStage::Three)] {
        let config = ParallelConfig { data_lanes: 2, ..ParallelConfig::default() };
        let layout = Layout { precision: Precision::Bf16, ..Layout::of(world, stage, config) };
        on_ranks(world, |ranks| {
            let placement = layout.placement(&ranks).unwrap();
            let base = || Model::initial(spec(true), Head::Scalar, 7).unwrap();
            let expected = base().units().unwrap()[0].get(SCORE).unwrap();
            let model = base().place(&placement).unwrap().with_lora(&self::config(3, 0.0), 5, &placement).unwrap();
            let values = |score: &Tensor| score.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            if let Some(found) = model.whole_trained_unit(0).unwrap() {
                assert_eq!(values(&found.get(SCORE).unwrap()), values(&expected));
            }
            let (packed, ..) = batch(model.spec().vocab_size, &[9, 2, 30]);
            let scores = model.scores(&packed, &[8, 10, 40]).unwrap();
            let unadapted = base().place(&placement).unwrap().scores(&packed, &[8, 10, 40]).unwrap();
            assert_eq!(values(&scores), values(&unadapted), "fresh adapters change something");
        });
    }
}
