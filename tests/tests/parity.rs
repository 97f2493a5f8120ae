//! Every family computes what `transformers` computes: logits, losses, gradients of every parameter, greedy tokens.
//!
//! Differences are measured against the largest magnitude of the tensor; 1e-4 of it is allowed everywhere.

use candle_core::{DType, Tensor};
use tandem_engine::generate::{Request, SamplingKey, generate};
use tandem_engine::model::families::{TensorMap, tensors};
use tandem_engine::model::unit::{Head, UnitBuffer};
use tandem_engine::model::{Model, Recompute};
use tandem_engine::parallel::{Gradients, Placement};
use tandem_kernels::sample::SamplingParams;
use tandem_tests::golden::{
    CAUSAL, Vectors, assert_close, difference, floats, in_file_order, largest, last_rows, model, predictions,
};

#[test]
fn logits() {
    for name in CAUSAL {
        let vectors = Vectors::of(name);
        let logits = model(name, Head::Language).logits(&vectors.batch()).unwrap();
        assert_close(name, &floats(&logits), &vectors.floats("logits"));
    }
}

#[test]
fn losses_of_each_sequence_and_of_all() {
    for name in CAUSAL {
        let vectors = Vectors::of(name);
        let batch = vectors.batch();
        let (rows, labels) = predictions(&batch);
        let logp = floats(&model(name, Head::Language).log_probs(&batch, &rows, &labels).unwrap().logp);
        let mut sums = vec![0.0; batch.sequences()];
        for (row, logp) in rows.iter().zip(&logp) {
            let sequence = batch.cu_seqlens[1..].iter().position(|end| row < end).unwrap();
            sums[sequence] -= logp;
        }
        assert_close(name, &sums, &vectors.floats("loss/nll_sum"));
        let mean = sums.iter().sum::<f32>() / rows.len() as f32;
        assert_close(name, &[mean], &vectors.floats("loss/mean"));
    }
}

/// Compares every gradient with its golden one.
///
/// A gradient far below the model's largest may be zero by nature (a key bias moves all scores of a query alike) and the golden
/// one rounding noise; so the scale of a tensor is at least a thousandth of the model's largest gradient.
fn assert_gradients(name: &str, model: &Model, grads: &[UnitBuffer], vectors: &Vectors) {
    let maps = tensors(model.spec(), model.head()).unwrap();
    let mut ours: Vec<&str> = maps.iter().map(|map: &TensorMap| map.name.as_str()).collect();
    ours.sort_unstable();
    assert_eq!(ours, vectors.names("grad/"), "{name}: the parameters");
    let wanted: Vec<Vec<f32>> = maps.iter().map(|map| vectors.floats(&format!("grad/{}", map.name))).collect();
    let floor = 1e-3 * wanted.iter().map(|wanted| largest(wanted)).fold(0.0, f32::max);
    for (map, wanted) in maps.iter().zip(&wanted) {
        let error = difference(&in_file_order(grads, map), wanted);
        let scale = largest(wanted).max(floor);
        assert!(error <= 1e-4 * scale, "{name}: gradient of {}: off by {error:e} of {scale:e}", map.name);
    }
}

#[test]
fn gradients_of_every_parameter() {
    for name in CAUSAL {
        let vectors = Vectors::of(name);
        let (model, batch) = (model(name, Head::Language), vectors.batch());
        let (rows, labels) = predictions(&batch);
        for recompute in [Recompute::Off, Recompute::On] {
            let mut grads = Gradients::new(&Placement::solo(), &model.layouts()).unwrap();
            let trace = model.trace(&batch, &rows, None, recompute).unwrap();
            let mean = |out: &tandem_engine::LogProbs| Ok(out.logp.mean_all()?.neg()?);
            let (loss, _) = trace.backward_log_probs(&labels, &mut grads, mean).unwrap().unwrap();
            assert_close(name, &[loss as f32], &vectors.floats("loss/mean"));
            assert_gradients(name, &model, &grads.in_place().unwrap().unwrap(), &vectors);
        }
    }
}

#[test]
fn thirty_two_greedy_tokens() {
    for name in CAUSAL {
        let (model, vectors) = (model(name, Head::Language), Vectors::of(name));
        let request = |i: usize| Request {
            prompt: vectors.ids(&format!("greedy/{i}/prompt_ids")),
            samples: vec![i as u64],
            max_new_tokens: 32,
            stop: Vec::new(),
            sampling: SamplingParams::greedy(),
        };
        let requests = [request(0), request(1)];
        // One slot: one after the other. Two slots: side by side.
        for slots in [1, 2] {
            let key = SamplingKey { seed: 0, step: 0 };
            let completions = generate(&model, &requests, slots, 64, key, &mut |_, _, _| {}).unwrap();
            for (i, completion) in completions.iter().enumerate() {
                assert_eq!(completion.ids, vectors.ids(&format!("greedy/{i}/new_ids")), "{name}, prompt {i}");
            }
        }
    }
}

#[test]
fn scores_and_gradients_of_a_reward_model() {
    let name = "llama-reward";
    let (model, vectors) = (model(name, Head::Scalar), Vectors::of(name));
    let batch = vectors.batch();
    let every: Vec<u32> = (0..batch.tokens() as u32).collect();
    assert_close(name, &floats(&model.scores(&batch, &every).unwrap()), &vectors.floats("token_scores"));
    let last = last_rows(&batch);
    assert_close(name, &floats(&model.scores(&batch, &last).unwrap()), &vectors.floats("scores"));

    // The mean over pairs of −ln σ(score[2i] − score[2i + 1]).
    let pairwise = |scores: &Tensor| {
        let pairs = scores.reshape((scores.elem_count() / 2, 2))?;
        let margin = (pairs.narrow(1, 0, 1)? - pairs.narrow(1, 1, 1)?)?.to_dtype(DType::F32)?;
        Ok((margin.neg()?.exp()? + 1.0)?.log()?.mean_all()?)
    };
    let mut grads = Gradients::new(&Placement::solo(), &model.layouts()).unwrap();
    let trace = model.trace(&batch, &last, None, Recompute::Off).unwrap();
    let (loss, _) = trace.backward_scores(&mut grads, pairwise).unwrap().unwrap();
    assert_close(name, &[loss as f32], &vectors.floats("loss/mean"));
    assert_gradients(name, &model, &grads.in_place().unwrap().unwrap(), &vectors);
}
