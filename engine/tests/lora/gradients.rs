//! Gradients of adapters: against central differences, against the gradient of whole weights, and of nothing else.

use candle_core::Tensor;
use tandem_engine::model::unit::{Head, SCORE, UnitBuffer};
use tandem_engine::parallel::Placement;
use tandem_engine::{Dropout, Engine, Model, Packed, Recompute};

use crate::adapted::{FAMILIES, adapted, all_bits, base, batch, config, golden, unit};
use crate::toy::{negative_sum, optimizer};

/// Loss and gradient of a model, unit by unit.
fn gradient(
    model: &Model,
    batch: &Packed,
    rows: &[u32],
    labels: &[u32],
    dropout: Option<Dropout>,
    recompute: Recompute,
) -> (f64, Vec<Vec<f32>>) {
    let mut engine = Engine::new(model.clone(), optimizer()).unwrap();
    let (loss, _) = engine.accumulate_log_probs(batch, rows, labels, dropout, recompute, negative_sum).unwrap();
    let grads = engine.grads().in_place().unwrap().unwrap();
    (loss, grads.iter().map(|unit| unit.flat().to_vec1::<f32>().unwrap()).collect())
}

/// The slope along each matrix's gradient, which central differences of the loss measure best, with dropout's masks held.
#[test]
fn gradients_match_central_differences() {
    for family in FAMILIES {
        for (dropout, recompute) in [(0.0, Recompute::Off), (0.3, Recompute::On)] {
            let config = config(3, dropout);
            let model = base(family);
            let (spec, head) = (model.spec().clone(), model.head());
            let (batch, rows, labels) = batch(spec.vocab_size, &[7, 2, 11]);
            let drop = Some(Dropout { probability: 0.0, seed: 9, step: 4 });
            let start = adapted(model.clone(), &config, &Placement::solo()).unwrap();
            let (_, grads) = gradient(&start, &batch, &rows, &labels, drop, recompute);
            let loss_at = |moved: usize, slot: &tandem_engine::model::unit::ParamSlot, by: f32| {
                let whole = |index| {
                    let own = unit(&spec, head, &config, index)?;
                    let mut flat = own.flat().to_vec1::<f32>()?;
                    if index == moved {
                        let range = slot.offset..slot.offset + slot.len();
                        flat[range.clone()].iter_mut().zip(&grads[index][range]).for_each(|(w, g)| *w += by * g);
                    }
                    UnitBuffer::from_vec(own.layout(), flat)
                };
                let model = model.clone().with_adapters(&config, &Placement::solo(), whole).unwrap();
                gradient(&model, &batch, &rows, &labels, drop, Recompute::Off).0
            };
            for (index, layout) in start.trained_layouts().iter().enumerate() {
                for slot in &layout.params {
                    let own = &grads[index][slot.offset..slot.offset + slot.len()];
                    let norm = own.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
                    assert!(norm > 0.0, "{family}: {} of unit {index} has no gradient", slot.name);
                    // Short, for a ReLU that turns over on the way bends the slope.
                    let step = 2e-3 / norm;
                    let rise = loss_at(index, slot, step as f32) - loss_at(index, slot, -step as f32);
                    let measured = rise / (2.0 * step * norm);
                    let error = (measured - norm).abs() / norm;
                    assert!(error < 0.02, "{family}: {} of unit {index}: {measured} instead of {norm}", slot.name);
                }
            }
        }
    }
}

/// `dA = s·Bᵀ·dW` and `dB = s·dW·Aᵀ`, where `dW` is the gradient of the whole weights at the merged model.
#[test]
fn gradients_are_those_of_whole_weights_through_the_product() {
    for family in FAMILIES {
        let config = config(3, 0.0);
        let (model, head) = (base(family), Head::Language);
        let spec = model.spec().clone();
        let (batch, rows, labels) = batch(spec.vocab_size, &[9, 4]);
        let model = adapted(model, &config, &Placement::solo()).unwrap();
        let (_, low) = gradient(&model, &batch, &rows, &labels, None, Recompute::Off);
        let merged = (0..=spec.layers).map(|index| model.whole_unit(index).unwrap().unwrap()).collect();
        let merged = Model::from_parts(spec.clone(), head, merged).unwrap();
        let (_, whole) = gradient(&merged, &batch, &rows, &labels, None, Recompute::Off);
        for (index, layout) in model.trained_layouts().iter().enumerate().skip(1) {
            let low = UnitBuffer::from_vec(layout, low[index].clone()).unwrap();
            let dw = UnitBuffer::from_vec(&merged.layouts()[index], whole[index].clone()).unwrap();
            let weights = unit(&spec, head, &config, index).unwrap();
            for slot in layout.params.iter().filter(|slot| slot.name.ends_with("lora_a")) {
                let stem = slot.name.strip_suffix(".lora_a").unwrap();
                let name_b = format!("{stem}.lora_b");
                let (a, b) = (weights.get(slot.name).unwrap(), weights.get(&name_b).unwrap());
                let (queries, keys) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
                let (weight, first) = match stem {
                    "q" | "qkv" => ("qkv.weight", 0),
                    "k" => ("qkv.weight", queries),
                    "v" => ("qkv.weight", queries + keys),
                    "gate" => ("up.weight", 0),
                    "up" if spec.gated => ("up.weight", spec.mlp_width),
                    "up" => ("up.weight", 0),
                    "output" => ("output.weight", 0),
                    _ => ("down.weight", 0),
                };
                let dw = dw.get(weight).unwrap().narrow(0, first, b.dims()[0]).unwrap();
                let da = (b.t().unwrap().matmul(&dw).unwrap() * 2.0).unwrap();
                let db = (dw.matmul(&a.t().unwrap()).unwrap() * 2.0).unwrap();
                assert_near(&low.get(slot.name).unwrap(), &da, &format!("{family}: {} of {index}", slot.name));
                assert_near(&low.get(&name_b).unwrap(), &db, &format!("{family}: {name_b} of {index}"));
            }
        }
    }
}

/// Two ways around the same sums: they differ by rounding only.
fn assert_near(found: &Tensor, expected: &Tensor, what: &str) {
    let norm = |x: &Tensor| x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
    let (error, scale) = (norm(&(found - expected).unwrap()), norm(expected));
    assert!(scale > 0.0 && error < 1e-5 * scale, "{what}: off by {error:e} of {scale:e}");
}

/// Adapters drop with their own probability and only where training asks; scoring never does.
#[test]
fn dropout_is_an_argument() {
    let placement = Placement::solo();
    let of = |dropout| adapted(base("llama"), &config(3, dropout), &placement).unwrap();
    let (model, never) = (of(0.3), of(0.0));
    let (batch, rows, labels) = batch(model.spec().vocab_size, &[7, 12]);
    let loss = |model: &Model, step: Option<u64>| {
        let dropout = step.map(|step| Dropout { probability: 0.0, seed: 2, step });
        gradient(model, &batch, &rows, &labels, dropout, Recompute::Off).0
    };
    assert_eq!(loss(&model, None), loss(&never, None));
    assert_eq!(loss(&never, Some(1)), loss(&never, None));
    assert_ne!(loss(&model, Some(1)), loss(&model, None));
    assert_ne!(loss(&model, Some(1)), loss(&model, Some(2)), "another step, other masks");
    assert_eq!(loss(&model, Some(1)), loss(&model, Some(1)));
    let scored = |model: &Model| model.log_probs(&batch, &rows, &labels).unwrap().logp.to_vec1::<f32>().unwrap();
    assert_eq!(scored(&model), scored(&never));
}

#[test]
fn fresh_adapters_change_nothing_and_start_as_peft_draws_them() {
    for family in ["llama", "gpt2"] {
        let model = base(family);
        let (batch, rows, labels) = batch(model.spec().vocab_size, &[5, 8]);
        let before = model.log_probs(&batch, &rows, &labels).unwrap();
        let config = config(4, 0.5);
        let lora = model.with_lora(&config, 11, &Placement::solo()).unwrap();
        let after = lora.log_probs(&batch, &rows, &labels).unwrap();
        assert_eq!(after.logp.to_vec1::<f32>().unwrap(), before.logp.to_vec1::<f32>().unwrap(), "B is zero");
        for index in 1..=lora.spec().layers {
            let unit = lora.whole_trained_unit(index).unwrap().unwrap();
            for slot in &unit.layout().params {
                let values = unit.get(slot.name).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
                if slot.name.ends_with("lora_b") {
                    assert!(values.iter().all(|value| *value == 0.0), "{}", slot.name);
                    continue;
                }
                let bound = 1.0 / (slot.shape[1] as f32).sqrt();
                let largest = values.iter().fold(0f32, |most, value| most.max(value.abs()));
                assert!(largest <= bound && largest > 0.9 * bound, "{}: {largest} of {bound}", slot.name);
                // The variance of a uniform number, bound² / 3, within five standard deviations of its estimate.
                let n = values.len() as f32;
                let variance = values.iter().map(|value| value * value).sum::<f32>() / n / (bound * bound);
                assert!((variance - 1.0 / 3.0).abs() < 5.0 * (4.0 / 45.0 / n).sqrt(), "{}: {variance}", slot.name);
            }
        }
        let again = base(family).with_lora(&config, 11, &Placement::solo()).unwrap();
        let adapters = |model: &Model| all_bits(model, |index| model.whole_trained_unit(index));
        assert_eq!(adapters(&again), adapters(&lora), "the same seed");
        let other = base(family).with_lora(&config, 12, &Placement::solo()).unwrap();
        assert_ne!(adapters(&other), adapters(&lora), "another seed");
    }
}

/// A square `A` that is the identity makes the adapter the weights themselves: `dB` is their gradient.
#[test]
fn full_rank_adapters_move_as_whole_weights() {
    let model = base("llama");
    let (spec, head) = (model.spec().clone(), Head::Language);
    let (batch, rows, labels) = batch(spec.vocab_size, &[6, 5]);
    let (_, whole) = gradient(&model, &batch, &rows, &labels, None, Recompute::Off);
    let layouts = model.layouts();
    let mut config = config(spec.hidden, 0.0);
    (config.alpha, config.targets) = (spec.hidden as f64, vec!["v_proj".into()]);
    let lora = model.with_adapters(&config, &Placement::solo(), |index| {
        let unit = unit(&spec, head, &config, index)?;
        let mut flat = vec![0f32; unit.layout().len()];
        if index > 0 {
            (0..spec.hidden).for_each(|at| flat[at * spec.hidden + at] = 1.0);
        }
        UnitBuffer::from_vec(unit.layout(), flat)
    });
    let lora = lora.unwrap();
    let (_, low) = gradient(&lora, &batch, &rows, &labels, None, Recompute::Off);
    for index in 1..=spec.layers {
        let db =
            UnitBuffer::from_vec(&lora.trained_layouts()[index], low[index].clone()).unwrap().get("v.lora_b").unwrap();
        let dw = UnitBuffer::from_vec(&layouts[index], whole[index].clone()).unwrap().get("qkv.weight").unwrap();
        let first = (spec.heads + spec.kv_heads) * spec.head_dim;
        assert_near(&db, &dw.narrow(0, first, spec.kv_heads * spec.head_dim).unwrap(), "v_proj");
    }
}

/// Training moves the adapters and not one bit of the base, which goes on as the reference; a scalar head is trained along.
#[test]
fn training_leaves_the_base_as_it_is() {
    let loaded = tandem_engine::model::import::load(&golden("llama-reward"), Head::Scalar).unwrap();
    let model = loaded.into_model().unwrap().0;
    let base_bits = |model: &Model| all_bits(model, |index| model.whole_unit(index));
    let before = base_bits(&model);
    let lora = model.clone().with_lora(&config(2, 0.1), 1, &Placement::solo()).unwrap();
    let (batch, ..) = batch(lora.spec().vocab_size, &[5, 9]);
    let ends = [4, 13];
    let mut engine = Engine::new(lora, optimizer()).unwrap();
    let initial = engine.model().scores(&batch, &ends).unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(initial, model.scores(&batch, &ends).unwrap().to_vec1::<f32>().unwrap());
    for step in 0..5 {
        let dropout = Some(Dropout { probability: 0.0, seed: 1, step });
        engine
            .accumulate_scores(&batch, &ends, dropout, Recompute::Off, |scores| Ok(scores.sqr()?.sum_all()?))
            .unwrap();
        assert!(engine.step(2.0).unwrap().applied);
    }
    let trained = engine.model();
    assert_eq!(base_bits(&trained.base()), before);
    assert_eq!(base_bits(&model), before);
    let now = trained.scores(&batch, &ends).unwrap().to_vec1::<f32>().unwrap();
    let reference = trained.base().scores(&batch, &ends).unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(reference, initial);
    assert_ne!(now, initial);
    let score = |model: &Model| model.whole_unit(0).unwrap().unwrap().get(SCORE).unwrap();
    assert_ne!(score(trained).to_vec2::<f32>().unwrap(), score(&model).to_vec2::<f32>().unwrap());
    // A model that nothing is known of computes the same from the merged weights.
    let spec = trained.spec().clone();
    let merged = (0..=spec.layers).map(|index| trained.whole_unit(index).unwrap().unwrap()).collect();
    let merged = Model::from_parts(spec, Head::Scalar, merged).unwrap();
    for (merged, trained) in merged.scores(&batch, &ends).unwrap().to_vec1::<f32>().unwrap().iter().zip(&now) {
        assert!((merged - trained).abs() < 1e-5 * (1.0 + trained.abs()), "{merged} {trained}");
    }
}
