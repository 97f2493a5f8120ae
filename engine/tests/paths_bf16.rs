//! Every way that this processor has to compute: what is sampled, scored and trained in bf16 is one number on each, ranks
//! agree to the bit on each, and each is within the roundings of bf16 of f32.
//!
//! One test in its own binary, because the choice of path is process-wide.

#[path = "parallel/ranks.rs"]
#[allow(unreachable_pub)]
mod ranks;
#[path = "parallel/toy.rs"]
#[allow(dead_code, unreachable_pub)]
mod toy;

use std::path::Path;

use tandem_engine::generate::{CacheSize, KvCache, Request, SamplingKey, Scheduler, generate};
use tandem_engine::model::import::load;
use tandem_engine::model::unit::{Head, UnitBuffer};
use tandem_engine::parallel::{Gradients, ParallelConfig, Placement, ZeroStage};
use tandem_engine::{LogProbs, Model, Packed, Precision, Recompute};
use tandem_kernels::Isa;
use tandem_kernels::gemm::Bf16Path;
use tandem_kernels::sample::SamplingParams;

use ranks::on_ranks;
use toy::{Layout, engine, spec, train, weight_bits};

const FAMILIES: [&str; 7] = ["llama", "llama-tied", "mistral", "qwen2", "gpt2", "opt", "opt-350m"];
const KEY: SamplingKey = SamplingKey { seed: 3, step: 1 };

fn golden(name: &str, precision: Precision) -> Model {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name);
    let model = load(&folder, Head::Language).unwrap().into_model().unwrap().0;
    model.with_precision(precision).unwrap()
}

fn requests() -> Vec<Request> {
    let request = |index: u32| Request {
        prompt: (0..1 + (index * 5) % 12).map(|at| 3 + (index * 17 + at * 7) % 90).collect(),
        samples: (0..1 + u64::from(index % 3)).map(|sample| u64::from(index) * 10 + sample).collect(),
        max_new_tokens: 4 + (index as usize * 3) % 17,
        stop: vec![2],
        sampling: SamplingParams::default(),
    };
    (0..7).map(request).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// A batch, rows of it and their labels.
type Scored = (Packed, Vec<u32>, Vec<u32>);

/// Every next token of some sequences.
fn batch() -> Scored {
    let sequences: Vec<Vec<u32>> =
        (0..8u32).map(|i| (0..3 + (i * 7) % 20).map(|j| (i * 31 + j * 13) % 97).collect()).collect();
    let (mut batch, mut rows, mut labels) = (Packed::new(), Vec::new(), Vec::new());
    for (sample, ids) in sequences.iter().enumerate() {
        let first = batch.tokens() as u32;
        batch.push(ids, sample as u64);
        rows.extend(first..first + ids.len() as u32 - 1);
        labels.extend_from_slice(&ids[1..]);
    }
    (batch, rows, labels)
}

/// Log-probabilities in training, and the gradient.
fn trained(model: &Model, (batch, rows, labels): &Scored, recompute: Recompute) -> (Vec<f32>, Vec<UnitBuffer>) {
    let mut grads = Gradients::new(&Placement::solo(), &model.layouts()).unwrap();
    let trace = model.trace(batch, rows, None, recompute).unwrap();
    let loss = |out: &LogProbs| Ok(out.logp.sum_all()?.neg()?);
    let (_, out) = trace.backward_log_probs(labels, &mut grads, loss).unwrap().unwrap();
    (out.logp.to_vec1().unwrap(), grads.in_place().unwrap().unwrap())
}

/// What is recorded while sampling, with packed matrices and without, is what is scored and what is trained.
fn one_number(model: &Model, what: &str) {
    let requests = requests();
    let completions = generate(model, &requests, 4, 16, KEY, &mut |_, _, _| {}).unwrap();
    let cache = KvCache::new(model, CacheSize { slots: 2, max_len: 40 }).unwrap();
    let plain = Scheduler::new(model, &cache, KEY, 40).run(&requests, &mut |_, _, _| {}).unwrap();
    assert!(completions == plain, "{what}: packed matrices or the company make a difference");
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
    assert_eq!(bits(&recorded), bits(&scored), "{what}: sampled and scored");
    let all = (batch, rows, labels);
    for recompute in [Recompute::Off, Recompute::On] {
        assert_eq!(bits(&recorded), bits(&trained(model, &all, recompute).0), "{what}: sampled and trained");
    }
}

fn rms(values: &[f32]) -> f64 {
    (values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>() / values.len() as f64).sqrt()
}

/// What a family computes in f32 on the path that the processor prefers.
struct Expected {
    logits: Vec<f32>,
    gradients: Vec<Vec<f32>>,
}

fn flat(units: &[UnitBuffer]) -> Vec<Vec<f32>> {
    units.iter().map(|unit| unit.flat().to_vec1().unwrap()).collect()
}

fn logits(model: &Model, batch: &Packed) -> Vec<f32> {
    model.logits(batch).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn expected(family: &str, scored: &Scored) -> Expected {
    let model = golden(family, Precision::F32);
    let gradients = flat(&trained(&model, scored, Recompute::Off).1);
    Expected { logits: logits(&model, &scored.0), gradients }
}

/// Each rounding changes a number by at most 2⁻⁸ of it, and a path to a logit has some 16 in each block and at most 11 at the
/// ends (they are counted in the parity tests of bf16): √n · 2⁻⁸. Gradients see twice as many, each with 0.4 of that on
/// average, and a difference of nearly equal numbers in the softmax (see there): a relative error of 0.1 is granted.
fn close(model: &Model, expected: &Expected, scored: &Scored, what: &str) {
    let bound = ((11 + 16 * model.spec().layers) as f64).sqrt() / 256.0;
    let errors: Vec<f32> = logits(model, &scored.0).iter().zip(&expected.logits).map(|(a, b)| a - b).collect();
    let error = rms(&errors) / rms(&expected.logits);
    assert!(error <= bound && 10.0 * error >= bound, "{what}: error {error:e}, bound {bound:e}");
    for (unit, (a, b)) in flat(&trained(model, scored, Recompute::Off).1).iter().zip(&expected.gradients).enumerate() {
        let dot: f64 = a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
        let cosine = dot / (a.len() as f64 * rms(a) * rms(b));
        assert!(cosine > 0.995, "{what}: gradient of unit {unit}: cosine {cosine}");
        assert!((rms(a) / rms(b) - 1.0).abs() < 0.05, "{what}: gradient of unit {unit}: {} {}", rms(a), rms(b));
    }
}

/// Ranks that hold slices, pieces and stages train what one rank trains.
fn ranks_agree(what: &str) {
    for (gated, tensor, pipeline) in [(true, 2, 1), (false, 1, 2)] {
        let config = ParallelConfig { data_lanes: 2, tensor_lanes: tensor, ..ParallelConfig::default() };
        let run = |world: usize, stage: ZeroStage, config: ParallelConfig| {
            let layout = Layout { precision: Precision::Bf16, ..Layout::of(world, stage, config) };
            let mut all = on_ranks(world, |ranks| {
                let mut engine = engine(&spec(gated), &layout.placement(&ranks).unwrap()).unwrap();
                let norms = train(&mut engine, &layout, 2, 9).unwrap();
                (weight_bits(engine.model()).unwrap(), norms)
            });
            all.swap_remove(0)
        };
        let alone = run(1, ZeroStage::Zero, config);
        let together = run(4, ZeroStage::Three, ParallelConfig { tensor, pipeline, ..config });
        assert!(alone == together, "{what}: four ranks train otherwise than one");
    }
}

#[test]
fn every_path_keeps_the_promises() {
    let scored = batch();
    let all: Vec<_> = FAMILIES.iter().map(|family| (*family, expected(family, &scored))).collect();
    let mut paths = 0;
    for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Amx] {
        if !isa.force() {
            println!("{isa:?} is skipped: this processor has {:?} at most", Isa::detect());
            continue;
        }
        for path in [Bf16Path::Widen, Bf16Path::Dot, Bf16Path::Amx] {
            if !path.force() {
                println!("{isa:?} with {path:?} is skipped: this processor has {:?} at most", Bf16Path::detect());
                continue;
            }
            if Bf16Path::active() != path {
                println!("{isa:?} with {path:?} is skipped: it takes {:?} instead", Bf16Path::active());
                continue;
            }
            let what = format!("{isa:?}, {path:?}");
            for (family, expected) in &all {
                let model = golden(family, Precision::Bf16);
                one_number(&model, &format!("{family}, {what}"));
                close(&model, expected, &scored, &format!("{family}, {what}"));
            }
            ranks_agree(&what);
            paths += 1;
        }
        for family in FAMILIES {
            one_number(&golden(family, Precision::F32), &format!("{family} in f32, {isa:?}"));
        }
    }
    println!("{paths} paths");
    assert!(paths >= 1);
}
