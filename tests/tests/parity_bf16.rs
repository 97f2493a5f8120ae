//! Every family in bf16 computes what `transformers` computes in f32, but for the roundings of bf16.
//!
//! One rounding changes a number by at most `u = 2⁻⁸` of it. On its way to a logit a number is rounded with the embedding and
//! the positions (2); in each of the two branches of a block as input of its first map, with that map's weights, as its output,
//! after what is between (rotation, activation, softmax, attention: at most 3), and with the second map's weights (7), and
//! beside that the norm's weights (1); at last with the final norm's weights, as its output, and with the head's weights (3),
//! and two more where embeddings are projected. The residual stream is not rounded. So a path has
//! `n = 5 + 16·layers (+ 6)` roundings, whose errors are independent: together an error of `√n · u` of the magnitude of
//! what is summed, at most. A mean over many numbers is compared, the root of the mean square, with that of the logits.
//!
//! The mean error of a rounding is smaller, 0.4 u, and not every number takes all of a path; so that the bound says something,
//! it must not be more than 8 times what is measured.

use tandem_engine::model::unit::{Head, UnitBuffer};
use tandem_engine::model::{Model, Recompute};
use tandem_engine::parallel::{Gradients, Placement};
use tandem_engine::{LogProbs, Precision};
use tandem_kernels::mlp::Activation;
use tandem_tests::golden::{CAUSAL, Vectors, floats, in_file_order, last_rows, model, predictions};

use candle_core::{DType, Tensor};
use tandem_engine::model::families::tensors;

const UNIT: f64 = 1.0 / 256.0;

fn narrow(name: &str, head: Head) -> Model {
    model(name, head).with_precision(Precision::Bf16).unwrap()
}

/// The bound of the error of a logit, relative to what is summed.
fn bound(model: &Model) -> f64 {
    let projections = if model.spec().embedding_width.is_some() { 6 } else { 0 };
    ((5 + 16 * model.spec().layers + projections) as f64).sqrt() * UNIT
}

/// Root of the mean square.
fn rms(values: &[f32]) -> f64 {
    (values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>() / values.len() as f64).sqrt()
}

fn error(got: &[f32], wanted: &[f32]) -> f64 {
    assert_eq!(got.len(), wanted.len());
    rms(&got.iter().zip(wanted).map(|(a, b)| a - b).collect::<Vec<_>>())
}

/// Fails if `error` is beyond `bound` or so far below that the bound says nothing.
fn assert_within(what: &str, error: f64, bound: f64) {
    println!("{what}: {error:.2e}, {:.2} of the bound", error / bound);
    assert!(error <= bound, "{what}: error {error:e}, bound {bound:e}");
    assert!(8.0 * error >= bound, "{what}: error {error:e} is far below the bound {bound:e}: is this bf16?");
}

#[test]
fn logits_and_log_probs() {
    for name in CAUSAL {
        let (vectors, model) = (Vectors::of(name), narrow(name, Head::Language));
        let (batch, wanted) = (vectors.batch(), vectors.floats("logits"));
        let (bound, scale) = (bound(&model), rms(&wanted));
        let logits = floats(&model.logits(&batch).unwrap());
        assert_within(&format!("{name}: logits"), error(&logits, &wanted), bound * scale);

        // A log-probability is a logit less the logarithm of a sum, an average of logits in what concerns errors: at most
        // twice the error, and the mean of many is smaller.
        let (rows, labels) = predictions(&batch);
        let wanted: Vec<f32> =
            rows.iter().zip(&labels).map(|(&row, &label)| log_softmax(&wanted, row, label)).collect();
        let logp = floats(&model.log_probs(&batch, &rows, &labels).unwrap().logp);
        assert_within(&format!("{name}: log-probabilities"), error(&logp, &wanted), 2.0 * bound * scale);
    }
}

/// Log-probability of `label` by row `row` of golden logits.
fn log_softmax(logits: &[f32], row: u32, label: u32) -> f32 {
    const VOCABULARY: usize = 97;
    let row = &logits[row as usize * VOCABULARY..][..VOCABULARY];
    let sum: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
    (f64::from(row[label as usize]) - sum.ln()) as f32
}

/// Each gradient is nearly the golden one. Its relative error, `√(2n) · 0.4 u`, twice as many roundings as in a forward
/// and each with its mean error, is about 0.015 if nothing enlarges it. What only queries and keys reach goes
/// through `P ∘ (dP − D)`, a difference of numbers that are nearly equal where attention is nearly even, as in these models with
/// random weights: the error stays and the difference is several times smaller. And a ReLU passes a gradient or not: of its inputs,
/// an error of 0.01 moves some 0.4 % across zero, which is an error of √0.004 in what it passes. In narrow models that is a
/// handful of numbers, and more or less by chance. Granted is a relative error of 0.1, and with a ReLU of 0.3.
///
/// A gradient far below the model's largest may be zero by nature (a key bias moves all scores of a query alike); of those below
/// a thousandth no direction is asked for.
fn assert_gradients(name: &str, model: &Model, grads: &[UnitBuffer], vectors: &Vectors) {
    let maps = tensors(model.spec(), model.head()).unwrap();
    let wanted: Vec<Vec<f32>> = maps.iter().map(|map| vectors.floats(&format!("grad/{}", map.name))).collect();
    let floor = 1e-3 * wanted.iter().map(|wanted| rms(wanted)).fold(0.0, f64::max);
    let (mut worst, mut compared) = (1f64, 0);
    for (map, wanted) in maps.iter().zip(&wanted) {
        let found = in_file_order(grads, map);
        let (norm, scale) = (rms(&found), rms(wanted));
        if scale < floor {
            assert!(norm < 2.0 * floor, "{name}: gradient of {}: {norm:e} instead of {scale:e}", map.name);
            continue;
        }
        let dot: f64 = found.iter().zip(wanted).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
        let cosine = dot / (wanted.len() as f64 * norm * scale);
        let what = format!("{name}: gradient of {}: cosine {cosine:.6}, norm {:.4}", map.name, norm / scale);
        let difference: Vec<f32> = found.iter().zip(wanted).map(|(a, b)| a - b).collect();
        let most = if model.spec().activation == Activation::Relu { 0.3 } else { 0.1 };
        assert!(rms(&difference) < most * scale, "{what}");
        (worst, compared) = (worst.min(cosine), compared + 1);
    }
    println!("{name}: {compared} of {} gradients, the worst cosine {worst:.6}", maps.len());
    assert!(4 * compared >= 3 * maps.len(), "{name}: only {compared} gradients are compared");
    assert!(worst < 1.0 - 1e-7, "{name}: is this bf16?");
}

#[test]
fn gradients_of_every_parameter() {
    for name in CAUSAL {
        let (vectors, model) = (Vectors::of(name), narrow(name, Head::Language));
        let batch = vectors.batch();
        let (rows, labels) = predictions(&batch);
        for recompute in [Recompute::Off, Recompute::On] {
            let mut grads = Gradients::new(&Placement::solo(), &model.layouts()).unwrap();
            let trace = model.trace(&batch, &rows, None, recompute).unwrap();
            let mean = |out: &LogProbs| Ok(out.logp.mean_all()?.neg()?);
            trace.backward_log_probs(&labels, &mut grads, mean).unwrap().unwrap();
            assert_gradients(name, &model, &grads.in_place().unwrap().unwrap(), &vectors);
        }
    }
}

#[test]
fn scores_and_gradients_of_a_reward_model() {
    let name = "llama-reward";
    let (vectors, model) = (Vectors::of(name), narrow(name, Head::Scalar));
    let batch = vectors.batch();
    let every: Vec<u32> = (0..batch.tokens() as u32).collect();
    let wanted = vectors.floats("token_scores");
    let scores = floats(&model.scores(&batch, &every).unwrap());
    assert_within("scores", error(&scores, &wanted), bound(&model) * rms(&wanted));

    // The mean over pairs of −ln σ(score[2i] − score[2i + 1]).
    let pairwise = |scores: &Tensor| {
        let pairs = scores.reshape((scores.elem_count() / 2, 2))?;
        let margin = (pairs.narrow(1, 0, 1)? - pairs.narrow(1, 1, 1)?)?.to_dtype(DType::F32)?;
        Ok((margin.neg()?.exp()? + 1.0)?.log()?.mean_all()?)
    };
    let mut grads = Gradients::new(&Placement::solo(), &model.layouts()).unwrap();
    let last = last_rows(&batch);
    let trace = model.trace(&batch, &last, None, Recompute::Off).unwrap();
    trace.backward_scores(&mut grads, pairwise).unwrap().unwrap();
    assert_gradients(name, &model, &grads.in_place().unwrap().unwrap(), &vectors);
}
