//! One meaning per number: what is sampled does not depend on the company, and the log-probability recorded while sampling is
//! the one that training computes, bit for bit.

use candle_core::Tensor;
use tandem_engine::generate::{CacheSize, Completion, KvCache, Request, SamplingKey, Scheduler, generate};
use tandem_engine::model::unit::Head;
use tandem_engine::parallel::{Gradients, Placement};
use tandem_engine::train::{OptimizerConfig, OptimizerKind, Schedule, ScheduleKind};
use tandem_engine::{Dropout, Engine, Model, Packed, Precision, Recompute, Train};
use tandem_kernels::sample::SamplingParams;
use tandem_tests::golden;

const KEY: SamplingKey = SamplingKey { seed: 11, step: 3 };

const BOTH: [Precision; 2] = [Precision::F32, Precision::Bf16];

fn load(family: &str, precision: Precision) -> Model {
    golden::model(family, Head::Language).with_precision(precision).unwrap()
}

/// Prompts of lengths 1 to 12, some wanted more than once, with different limits and sampling.
fn requests() -> Vec<Request> {
    (0..9u32)
        .map(|i| Request {
            prompt: (0..1 + (i * 5) % 12).map(|j| 3 + (i * 17 + j * 7) % 90).collect(),
            samples: (0..1 + u64::from(i % 3)).map(|s| u64::from(i) * 10 + s).collect(),
            max_new_tokens: 4 + (i as usize * 3) % 17,
            stop: vec![2, 40 + i],
            sampling: SamplingParams {
                temperature: if i % 4 == 3 { 0.7 } else { 1.0 },
                top_k: if i % 4 == 2 { 20 } else { 0 },
                ..SamplingParams::default()
            },
        })
        .collect()
}

fn answer(model: &Model, requests: &[Request], slots: usize, prefill_tokens: usize) -> Vec<Completion> {
    generate(model, requests, slots, prefill_tokens, KEY, &mut |_, _, _| {}).unwrap()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn recorded_log_probs_are_those_of_training() {
    for (family, precision) in golden::CAUSAL.into_iter().flat_map(|family| BOTH.map(|precision| (family, precision))) {
        let model = load(family, precision);
        let requests = requests();
        let completions = answer(&model, &requests, 5, 16);
        // All of them packed into one batch, which is nothing like how they were sampled.
        let (mut batch, mut rows, mut labels, mut recorded) = (Packed::new(), Vec::new(), Vec::new(), Vec::new());
        for completion in &completions {
            let prompt = &requests[completion.request].prompt;
            let first = batch.tokens() + prompt.len() - 1;
            batch.push(&[prompt.as_slice(), &completion.ids].concat(), completion.sample);
            rows.extend((first..first + completion.ids.len()).map(|row| row as u32));
            labels.extend_from_slice(&completion.ids);
            recorded.extend_from_slice(&completion.logp);
        }
        let scored = model.log_probs(&batch, &rows, &labels).unwrap().logp.to_vec1::<f32>().unwrap();
        assert_eq!(bits(&recorded), bits(&scored), "{family}, {precision:?}: scored");
        for recompute in [Recompute::Off, Recompute::On] {
            let mut grads = Gradients::new(&Placement::solo(), &model.layouts()).unwrap();
            let trace = model.trace(&batch, &rows, None, recompute).unwrap();
            let loss = |out: &tandem_engine::LogProbs| Ok(out.logp.sum_all()?);
            let (_, trained) = trace.backward_log_probs(&labels, &mut grads, loss).unwrap().unwrap();
            let trained = trained.logp.to_vec1::<f32>().unwrap();
            assert_eq!(bits(&recorded), bits(&trained), "{family}, {precision:?}: trained");
        }

        // Without the packed matrices that `generate` keeps.
        let cache = KvCache::new(&model, CacheSize { slots: 5, max_len: 40 }).unwrap();
        let plain = Scheduler::new(&model, &cache, KEY, 16).run(&requests, &mut |_, _, _| {}).unwrap();
        assert!(completions == plain, "{family}, {precision:?}: packed matrices make a difference");
    }
}

#[test]
fn a_completion_depends_on_its_request_alone() {
    BOTH.into_iter().for_each(a_completion_depends_on_its_request_alone_in);
}

fn a_completion_depends_on_its_request_alone_in(precision: Precision) {
    let (model, requests) = (load("llama", precision), requests());
    let all = answer(&model, &requests, 4, 8);
    assert_eq!(all.len(), requests.iter().map(|r| r.samples.len()).sum::<usize>());
    for (slots, prefill_tokens) in [(1, 1), (2, 100), (64, 4096)] {
        assert_eq!(all, answer(&model, &requests, slots, prefill_tokens), "{slots} slots");
    }
    for (index, request) in requests.iter().enumerate() {
        let alone = answer(&model, std::slice::from_ref(request), 8, 64);
        let together: Vec<&Completion> = all.iter().filter(|c| c.request == index).collect();
        assert_eq!(alone.len(), together.len());
        assert!(alone.iter().zip(together).all(|(a, b)| (&a.ids, bits(&a.logp)) == (&b.ids, bits(&b.logp))));
    }
    // Samples of one prompt are different draws.
    assert!(all.windows(2).any(|w| w[0].request == w[1].request && w[0].ids != w[1].ids));
}

#[test]
fn requests_that_cannot_be_met_are_refused() {
    let model = load("llama", Precision::F32);
    let request = |prompt: Vec<u32>, max_new_tokens| Request {
        prompt,
        samples: vec![0],
        max_new_tokens,
        stop: vec![],
        sampling: SamplingParams::default(),
    };
    for (bad, word) in [
        (request(vec![], 4), "no token"),
        (request(vec![1], 0), "max_new_tokens"),
        (request(vec![1; 60], 20), "limit of 64"),
        (request(vec![97], 4), "97"),
    ] {
        let error = generate(&model, &[bad], 1, 64, KEY, &mut |_, _, _| {}).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}

fn optimizer() -> OptimizerConfig {
    OptimizerConfig {
        kind: OptimizerKind::AdamW,
        schedule: Schedule {
            kind: ScheduleKind::Constant,
            peak_lr: 1e-3,
            warmup_steps: 0,
            total_steps: 9,
            min_ratio: 1.0,
        },
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        max_grad_norm: 1.0,
    }
}

fn sequences() -> Vec<Vec<u32>> {
    (0..8u32).map(|i| (0..3 + (i * 7) % 20).map(|j| (i * 31 + j * 13) % 97).collect()).collect()
}

/// Adds the gradient of the summed negative log-probability of all next tokens of `sequences`.
fn accumulate(
    engine: &mut Engine<tandem_engine::Train>,
    sequences: &[(usize, &Vec<u32>)],
    dropout: Option<Dropout>,
    recompute: Recompute,
) {
    let (mut batch, mut rows, mut labels) = (Packed::new(), Vec::new(), Vec::new());
    for &(sample, ids) in sequences {
        let first = batch.tokens() as u32;
        batch.push(ids, sample as u64);
        rows.extend(first..first + ids.len() as u32 - 1);
        labels.extend_from_slice(&ids[1..]);
    }
    let loss = |new: &tandem_engine::LogProbs| -> tandem_engine::Result<Tensor> { Ok(new.logp.sum_all()?.neg()?) };
    engine.accumulate_log_probs(&batch, &rows, &labels, dropout, recompute, loss).unwrap();
}

#[test]
fn recomputing_changes_no_bit_even_with_dropout() {
    for (family, precision) in golden::CAUSAL.into_iter().flat_map(|family| BOTH.map(|precision| (family, precision))) {
        let grads = [Recompute::Off, Recompute::On].map(|recompute| {
            let mut engine = Engine::new(load(family, precision), optimizer()).unwrap();
            let all = sequences();
            let dropout = Some(Dropout { probability: 0.2, seed: 5, step: 9 });
            accumulate(&mut engine, &all.iter().enumerate().collect::<Vec<_>>(), dropout, recompute);
            golden::bits(&engine.grads().in_place().unwrap().unwrap())
        });
        assert!(grads[0] == grads[1], "{family}, {precision:?}");
    }
}

#[test]
fn micro_batches_of_any_size_give_the_same_step() {
    BOTH.into_iter().for_each(micro_batches_of_any_size_give_the_same_step_in);
}

fn micro_batches_of_any_size_give_the_same_step_in(precision: Precision) {
    let all = sequences();
    let tokens: usize = all.iter().map(|ids| ids.len() - 1).sum();
    let grads = [8, 1, 3].map(|size| {
        let mut engine = Engine::new(load("qwen2", precision), optimizer()).unwrap();
        let dropout = Some(Dropout { probability: 0.1, seed: 5, step: 9 });
        for chunk in all.iter().enumerate().collect::<Vec<_>>().chunks(size) {
            accumulate(&mut engine, chunk, dropout, Recompute::Off);
        }
        let norm = engine.grad_norm(tokens as f64).unwrap();
        (
            norm,
            engine
                .grads()
                .in_place()
                .unwrap()
                .unwrap()
                .iter()
                .flat_map(|unit| unit.flat().to_vec1::<f32>().unwrap())
                .collect::<Vec<_>>(),
        )
    });
    let largest = grads[0].1.iter().fold(0f32, |most, g| most.max(g.abs()));
    for (norm, other) in &grads[1..] {
        assert!((norm / grads[0].0 - 1.0).abs() < 1e-6);
        assert!(grads[0].1.iter().zip(other).all(|(a, b)| (a - b).abs() <= 1e-6 * largest));
    }
}

#[test]
fn training_and_generating_do_not_depend_on_the_number_of_threads() {
    let run = |threads: usize, precision: Precision| {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
            let mut engine = Engine::new(load("llama", precision), optimizer()).unwrap();
            let all = sequences();
            accumulate(&mut engine, &all.iter().enumerate().collect::<Vec<_>>(), None, Recompute::Off);
            engine.step(50.0).unwrap();
            let completions = answer(engine.model(), &requests(), 4, 32);
            (golden::bits(&engine.model().units().unwrap()), completions)
        })
    };
    for precision in BOTH {
        assert!(run(1, precision) == run(3, precision), "{precision:?}");
    }
}

#[test]
fn switching_modes_leaves_weights_and_moments_as_they_are() {
    BOTH.into_iter().for_each(switching_modes_leaves_weights_and_moments_as_they_are_in);
}

fn switching_modes_leaves_weights_and_moments_as_they_are_in(precision: Precision) {
    let mut engine = Engine::new(load("llama", precision), optimizer()).unwrap();
    let all = sequences();
    accumulate(&mut engine, &all.iter().enumerate().collect::<Vec<_>>(), None, Recompute::Off);
    assert!(engine.into_generate(CacheSize { slots: 1, max_len: 8 }).unwrap_err().to_string().contains("gradients"));

    let mut engine = Engine::new(load("llama", precision), optimizer()).unwrap();
    accumulate(&mut engine, &all.iter().enumerate().collect::<Vec<_>>(), None, Recompute::Off);
    assert!(engine.step(50.0).unwrap().applied);
    let (weights, moments) = (golden::bits(&engine.model().units().unwrap()), moment_bits(&engine));
    for _ in 0..100 {
        let (mut generating, to) = engine.into_generate(CacheSize { slots: 2, max_len: 40 }).unwrap();
        assert_eq!(to.moved_bytes, 0, "one rank and one dtype: nothing is copied");
        generating.generate(&requests()[..2], KEY, 64, &mut |_, _, _| {}).unwrap();
        engine = generating.into_train().unwrap().0;
    }
    assert!(weights == golden::bits(&engine.model().units().unwrap()));
    assert!(moments == moment_bits(&engine));
}

/// The bits of the first moments.
fn moment_bits(engine: &Engine<Train>) -> Vec<u32> {
    engine.optimizer().first_moments().iter().flat_map(|slice| slice.iter().map(|value| value.to_bits())).collect()
}
