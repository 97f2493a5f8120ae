//! The merged copy: what generates is what is trained, and nothing is merged into the base.

use tandem_engine::generate::{CacheSize, Request, SamplingKey};
use tandem_engine::model::unit::{Head, UnitLayout};
use tandem_engine::parallel::{ParallelConfig, Placement, ZeroStage};
use tandem_engine::{Engine, LogProbs, Model, Packed, SwitchConfig, WeightFormat};
use tandem_kernels::sample::SamplingParams;

use crate::adapted::{FAMILIES, adapted, all_bits, base, batch, bits, config};
use crate::ranks::on_ranks;
use crate::toy::{Layout, optimizer, spec, train};

const SIZE: CacheSize = CacheSize { slots: 3, max_len: 40 };

/// How far log-probabilities may be apart. The longest sums of these models have fewer than 128 terms, in which merged and
/// separate products differ by at most 128 · 2⁻²⁴ of their magnitude; a handful of such maps follow on each other, and
/// log-probabilities are of the magnitude of ln 1100 ≈ 7.
const TOLERANCE: f32 = 8.0 * 128.0 / (1 << 24) as f32;

fn assert_near(found: &LogProbs, expected: &LogProbs, what: &str) {
    let pairs = [(&found.logp, &expected.logp), (&found.entropy, &expected.entropy)];
    for (found, expected) in pairs {
        let (found, expected) = (found.to_vec1::<f32>().unwrap(), expected.to_vec1::<f32>().unwrap());
        let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < TOLERANCE, "{what}: apart by {worst:e}");
    }
}

/// Adapters beside the weights and adapters in the weights compute the same, in every family and on any number of ranks.
#[test]
fn merged_weights_compute_what_adapters_do() {
    for family in FAMILIES {
        for (world, inference_tensor, stage) in
            [(1, 1, ZeroStage::Zero), (2, 2, ZeroStage::Zero), (2, 2, ZeroStage::Three), (2, 1, ZeroStage::Three)]
        {
            let Some(parallel) = fitting(family, 1, inference_tensor) else { continue };
            let layout = Layout::of(world, stage, parallel);
            on_ranks(world, |world| {
                let placement = layout.placement(&world).unwrap();
                let base = base(family).place(&placement).unwrap();
                let model = adapted(base, &config(4, 0.0), &placement).unwrap();
                assert!(!model.generates_in_place());
                let (batch, rows, labels) = batch(model.spec().vocab_size, &[3, 17, 8, 1]);
                let separate = model.log_probs(&batch, &rows, &labels).unwrap();
                let without = model.base().log_probs(&batch, &rows, &labels).unwrap();
                let (copy, _) = model.inference_copy(None, 2, WeightFormat::Precision).unwrap();
                let merged = copy.log_probs(&batch, &rows, &labels).unwrap();
                assert_near(&merged, &separate, &format!("{family} {layout:?}"));
                let moved = (merged.logp - without.logp).unwrap().abs().unwrap().max(0).unwrap();
                assert!(moved.to_scalar::<f32>().unwrap() > 100.0 * TOLERANCE, "{family}: the adapters do nothing");
            });
        }
    }
}

/// Who merges does not matter: the copy of any layout is a part of the weights that one rank exports.
#[test]
fn every_layout_merges_to_the_same_bits() {
    for family in FAMILIES {
        let whole = adapted(base(family), &config(4, 0.0), &Placement::solo()).unwrap();
        let expected = all_bits(&whole, |index| whole.whole_unit(index));
        for (stage, tensor, inference_tensor) in
            [(ZeroStage::Three, 1, 2), (ZeroStage::Two, 2, 1), (ZeroStage::Three, 1, 1), (ZeroStage::Zero, 2, 2)]
        {
            let Some(parallel) = fitting(family, tensor, inference_tensor) else { continue };
            let layout = Layout::of(2, stage, parallel);
            let found = on_ranks(2, |world| {
                let placement = layout.placement(&world).unwrap();
                let model = adapted(base(family).place(&placement).unwrap(), &config(4, 0.0), &placement).unwrap();
                let exported = all_bits(&model, |index| model.whole_unit(index));
                let (copy, _) = model.inference_copy(None, 1, WeightFormat::Precision).unwrap();
                (exported, copy.units().unwrap(), copy.layouts())
            });
            assert!(found[0].0 == expected, "{family} {layout:?}: exported weights differ");
            assert!(found[1].0.is_empty());
            for (_, units, layouts) in &found {
                for (index, (unit, layout)) in units.iter().zip(layouts).enumerate() {
                    let whole = whole.whole_unit(index).unwrap().unwrap();
                    let (here, whole) = (bits(unit), bits(&whole));
                    for run in layout.runs(base(family).spec(), Head::Language) {
                        assert!(
                            here[run.here..run.here + run.len] == whole[run.whole..run.whole + run.len],
                            "{family}"
                        );
                    }
                }
            }
        }
    }
}

/// Two pieces, or one where there is but one key-value head; `None` if the ranks are more.
fn fitting(family: &str, tensor: usize, inference_tensor: usize) -> Option<ParallelConfig> {
    let tensor_lanes = base(family).spec().kv_heads.min(2);
    let fits = tensor.max(inference_tensor) <= tensor_lanes;
    fits.then(|| ParallelConfig { tensor, inference_tensor, tensor_lanes, ..ParallelConfig::default() })
}

/// Switching reports what has moved, and leaves base and adapters alone.
#[test]
fn switches_change_no_bit() {
    for (stage, switching) in [
        (ZeroStage::Three, SwitchConfig::default()),
        (ZeroStage::Zero, SwitchConfig { pin_parameters: true, gather_units: 1, ..SwitchConfig::default() }),
    ] {
        let parallel = ParallelConfig { inference_tensor: 2, ..ParallelConfig::default() };
        let layout = Layout::of(2, stage, parallel);
        on_ranks(2, |world| {
            let placement = layout.placement(&world).unwrap();
            let base = Model::initial(spec(true), Head::Language, 7).unwrap().place(&placement).unwrap();
            let model = adapted(base, &config(3, 0.1), &placement).unwrap();
            let mut engine = Engine::placed(model, optimizer(), placement).unwrap().switching(switching);
            train(&mut engine, &layout, 1, 5).unwrap();
            let all = |model: &Model| {
                let trained = all_bits(model, |index| model.whole_trained_unit(index));
                (trained, all_bits(&model.base(), |index| model.base().whole_unit(index)))
            };
            let before = all(engine.model());
            let mut copies: Vec<Vec<Vec<u32>>> = Vec::new();
            for switch in 0..100 {
                let (generating, report) = engine.into_generate(SIZE).unwrap();
                copies.push(generating.inference_model().units().unwrap().iter().map(bits).collect());
                copies.dedup();
                let copy: usize = generating.inference_model().layouts().iter().map(|layout| layout.len()).sum();
                let is_new = switch == 0 || !switching.pin_parameters;
                assert_eq!(report.allocated_bytes > 4 * copy as u64, is_new, "switch {switch}");
                assert_eq!(report.moved_bytes > 0, stage == ZeroStage::Three);
                engine = generating.into_train().unwrap().0;
            }
            assert_eq!(copies.len(), 1, "the copies differ");
            assert!(all(engine.model()) == before);
        });
    }
}

/// What is recorded while sampling is what training computes, up to rounding; ranks sample the same.
#[test]
fn rollouts_record_the_adapted_policy() {
    for gated in [true, false] {
        let run = |world: usize, inference_tensor: usize| {
            let parallel = ParallelConfig { inference_tensor, tensor_lanes: 2, ..ParallelConfig::default() };
            let layout = Layout::of(world, ZeroStage::Three, parallel);
            on_ranks(world, |world| {
                let placement = layout.placement(&world).unwrap();
                let base = Model::initial(spec(gated), Head::Language, 7).unwrap().place(&placement).unwrap();
                let model = adapted(base, &config(3, 0.0), &placement).unwrap();
                let engine = Engine::placed(model, optimizer(), placement).unwrap();
                let request = |index: u32| Request {
                    prompt: (0..2 + index).map(|at| at * 97 + index).collect(),
                    samples: vec![u64::from(index)],
                    max_new_tokens: 9,
                    stop: vec![],
                    sampling: SamplingParams::default(),
                };
                let requests: Vec<_> = (0..4).map(request).collect();
                let (mut generating, _) = engine.into_generate(SIZE).unwrap();
                let key = SamplingKey { seed: 1, step: 2 };
                let completions = generating.generate(&requests, key, 16, &mut |_, _, _| {}).unwrap();
                let (engine, _) = generating.into_train().unwrap();
                for completion in &completions {
                    let prompt = &requests[completion.request].prompt;
                    let batch = Packed::from_sequences([[prompt.as_slice(), &completion.ids].concat()]);
                    let first = prompt.len() as u32 - 1;
                    let rows: Vec<u32> = (first..first + completion.ids.len() as u32).collect();
                    let out = engine.log_probs(&batch, &rows, &completion.ids).unwrap().logp.to_vec1::<f32>().unwrap();
                    for (trained, recorded) in out.iter().zip(&completion.logp) {
                        assert!((trained - recorded).abs() < TOLERANCE, "{trained} {recorded}");
                    }
                }
                completions.into_iter().map(|completion| completion.ids).collect::<Vec<_>>()
            })
        };
        let expected = run(1, 1).swap_remove(0);
        for ids in run(2, 1).into_iter().chain(run(2, 2)) {
            assert_eq!(ids, expected);
        }
    }
}

/// The base is one: the reference of a model with adapters holds no second copy, and is not in the trained layouts.
#[test]
fn the_reference_is_the_base_itself() {
    let start = base("qwen2");
    let (batch, rows, labels) = batch(start.spec().vocab_size, &[6, 9]);
    let alone = start.log_probs(&batch, &rows, &labels).unwrap();
    let model = adapted(start.clone(), &config(4, 0.0), &Placement::solo()).unwrap();
    let reference = model.base();
    let again = reference.log_probs(&batch, &rows, &labels).unwrap();
    assert_eq!(again.logp.to_vec1::<f32>().unwrap(), alone.logp.to_vec1::<f32>().unwrap());
    for (ours, theirs) in reference.units().unwrap().iter().zip(start.units().unwrap()) {
        assert_eq!(ours.flat().id(), theirs.flat().id(), "the same storage");
    }
    assert!(reference.lora().is_none() && reference.generates_in_place());
    assert_eq!(model.lora(), Some(&config(4, 0.0)));
    let lengths = |layouts: Vec<std::sync::Arc<UnitLayout>>| layouts.iter().map(|layout| layout.len()).sum::<usize>();
    assert_eq!(lengths(model.layouts()), reference.parameters());
    assert_eq!(lengths(model.trained_layouts()), model.trained_parameters());
    let error = model.with_lora(&config(1, 0.0), 1, &Placement::solo()).unwrap_err().to_string();
    assert!(error.contains("adapters already"), "{error}");
}
