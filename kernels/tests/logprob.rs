//! The head: against its f64 twin, finite differences, and itself under other batches, threads and callers.

mod common;

use candle_core::{DType, Device, Tensor};
use common::{bits, flat, tensor, wide, with_threads};
use tandem_kernels::gemm::linear;
use tandem_kernels::logprob::{HeadOut, head_logprob, head_logprob_backward, logits, row_stats};
use tandem_kernels::reference::logprob as twin;
use tandem_kernels::rng::{Philox, Purpose};

/// One head and a batch of rows, all random.
struct Case {
    rows: usize,
    width: usize,
    vocabulary: usize,
    inv_temperature: f32,
    h: Vec<f32>,
    w: Vec<f32>,
    bias: Option<Vec<f32>>,
    labels: Vec<u32>,
    dlogp: Vec<f32>,
    dentropy: Vec<f32>,
}

impl Case {
    fn new(rows: usize, width: usize, vocabulary: usize) -> Self {
        let rng = Philox::new(rows as u64 * 31 + width as u64, Purpose::Init, vocabulary as u64);
        let normal = |sample, len, std| {
            let mut values = vec![0f32; len];
            rng.fill_normal(sample, 0, std, &mut values);
            values
        };
        let labels = (0..rows).map(|row| rng.below(vocabulary as u64, row as u64, 1, 0) as u32).collect();
        Self {
            rows,
            width,
            vocabulary,
            inv_temperature: 1.0,
            h: normal(1, rows * width, 1.0),
            // Logits of spread 2, whatever the width.
            w: normal(2, vocabulary * width, 2.0 / (width as f64).sqrt()),
            bias: None,
            labels,
            dlogp: normal(3, rows, 1.0),
            dentropy: normal(4, rows, 1.0),
        }
    }

    fn with_bias(mut self) -> Self {
        self.bias = Some((0..self.vocabulary).map(|v| (v as f32 * 0.7).sin()).collect());
        self
    }

    fn at_temperature(mut self, temperature: f32) -> Self {
        self.inv_temperature = 1.0 / temperature;
        self
    }

    fn tensors(&self) -> (Tensor, Tensor, Option<Tensor>) {
        let h = tensor(&self.h, &[self.rows, self.width]);
        let w = tensor(&self.w, &[self.vocabulary, self.width]);
        (h, w, self.bias.as_ref().map(|bias| tensor(bias, &[self.vocabulary])))
    }

    fn forward(&self) -> HeadOut {
        let (h, w, bias) = self.tensors();
        head_logprob(&h, &w, bias.as_ref(), &self.labels, self.inv_temperature).unwrap()
    }

    /// (dh, dw, dbias), the last two added to zeros.
    fn backward(&self, with_entropy: bool) -> [Vec<f32>; 3] {
        let (h, w, bias) = self.tensors();
        let out = self.forward();
        let dlogp = tensor(&self.dlogp, &[self.rows]);
        let dentropy = with_entropy.then(|| tensor(&self.dentropy, &[self.rows]));
        // One buffer for both gradients, as in a flat buffer of a unit.
        let size = self.vocabulary * self.width;
        let grads = Tensor::zeros(size + self.vocabulary, DType::F32, &Device::Cpu).unwrap();
        let dw = grads.narrow(0, 0, size).unwrap().reshape((self.vocabulary, self.width)).unwrap();
        let dbias = grads.narrow(0, size, self.vocabulary).unwrap();
        let dbias_arg = self.bias.is_some().then_some(&dbias);
        let (labels, dentropy) = (&self.labels, dentropy.as_ref());
        let dh = head_logprob_backward(&dlogp, dentropy, &h, &w, bias.as_ref(), labels, &out, &dw, dbias_arg).unwrap();
        [flat(&dh), flat(&dw), flat(&dbias)]
    }

    /// `Σ dlogp · logp + dentropy · entropy` by the twin, with `h` and the parameters moved.
    fn objective(&self, with_entropy: bool, h: &[f64], w: &[f64], bias: &[f64]) -> f64 {
        let rows = h.chunks(self.width).enumerate();
        rows.map(|(row, h)| {
            let logits = twin::logits(h, w, bias, f64::from(self.inv_temperature));
            let logp = twin::log_softmax(&logits)[self.labels[row] as usize];
            let entropy = if with_entropy { f64::from(self.dentropy[row]) * twin::entropy(&logits) } else { 0.0 };
            f64::from(self.dlogp[row]) * logp + entropy
        })
        .sum()
    }
}

fn cases() -> Vec<Case> {
    vec![
        Case::new(1, 1, 1),
        Case::new(3, 5, 7),
        Case::new(4, 16, 512).with_bias(),
        Case::new(5, 17, 513).at_temperature(0.7),
        Case::new(2, 33, 1025).with_bias().at_temperature(2.0),
        Case::new(7, 20, 3000),
        Case::new(1030, 3, 11).with_bias(),
    ]
}

#[test]
fn forward_matches_the_twin() {
    for case in cases() {
        let (out, w) = (case.forward(), wide(&case.w));
        let (logp, entropy, lse) = (flat(&out.logp), flat(&out.entropy), flat(&out.lse));
        let bias = case.bias.as_deref().map(wide).unwrap_or_default();
        for (row, h) in wide(&case.h).chunks(case.width).enumerate() {
            let logits = twin::logits(h, &w, &bias, f64::from(case.inv_temperature));
            let label = case.labels[row] as usize;
            let expected = twin::log_softmax(&logits);
            for (name, got, want) in [
                ("logp", logp[row], expected[label]),
                ("entropy", entropy[row], twin::entropy(&logits)),
                ("lse", lse[row], logits[label] - expected[label]),
            ] {
                let error = (f64::from(got) - want).abs();
                assert!(error < 3e-6 * (1.0 + want.abs()), "V {} row {row} {name}: {got} {want}", case.vocabulary);
            }
        }
    }
}

/// Large logits leave the log-probability its digits: `lse` alone has lost them.
#[test]
fn size_of_the_logits_costs_no_digits() {
    let w = tensor(&[1000.0, 1000.5, 999.0], &[3, 1]);
    let out = head_logprob(&tensor(&[1.0], &[1, 1]), &w, None, &[0], 1.0).unwrap();
    let expected = -(1.0 + 0.5f64.exp() + (-1f64).exp()).ln();
    assert!((f64::from(flat(&out.logp)[0]) - expected).abs() < 1e-6);
}

#[test]
fn backward_matches_finite_differences() {
    for case in cases() {
        for with_entropy in [false, true] {
            let grads = case.backward(with_entropy);
            let mut inputs = [wide(&case.h), wide(&case.w), case.bias.as_deref().map(wide).unwrap_or_default()];
            for which in 0..3 {
                let len = inputs[which].len();
                // All entries of small arrays, a spread of large ones.
                for index in (0..len).step_by((len / 12).max(1)) {
                    let value = inputs[which][index];
                    let mut at = |moved: f64| {
                        inputs[which][index] = moved;
                        let [h, w, bias] = &inputs;
                        case.objective(with_entropy, h, w, bias)
                    };
                    let step = 1e-4;
                    let want = (at(value + step) - at(value - step)) / (2.0 * step);
                    at(value);
                    let got = f64::from(grads[which][index]);
                    assert!(
                        (got - want).abs() < 2e-5 * (1.0 + want.abs()),
                        "V {} entropy {with_entropy} input {which}[{index}]: {got} {want}",
                        case.vocabulary
                    );
                }
            }
        }
    }
}

#[test]
fn weight_gradients_are_added() {
    let case = Case::new(5, 17, 513);
    let (h, w, _) = case.tensors();
    let [_, once, _] = case.backward(true);
    let start = vec![2.5f32; once.len()];
    let dw = tensor(&start, &[513, 17]);
    let (dlogp, dentropy) = (tensor(&case.dlogp, &[5]), tensor(&case.dentropy, &[5]));
    head_logprob_backward(&dlogp, Some(&dentropy), &h, &w, None, &case.labels, &case.forward(), &dw, None).unwrap();
    for (got, term) in flat(&dw).iter().zip(once) {
        assert!((got - (2.5 + term)).abs() < 1e-5);
    }
}

/// Bitwise: a row alone, a row in any batch, and the row as the sampler sees it.
#[test]
fn a_row_does_not_know_its_batch() {
    for (width, vocabulary) in [(5, 7), (20, 1025), (300, 3000)] {
        for bias in [false, true] {
            let mut case = Case::new(40, width, vocabulary);
            if bias {
                case = case.with_bias();
            }
            let (h, w, bias) = case.tensors();
            let bias = bias.as_ref();
            let out = case.forward();
            for count in 1..=40 {
                let first = (40 - count) / 2;
                let h = h.narrow(0, first, count).unwrap();
                let labels = &case.labels[first..first + count];
                let part = head_logprob(&h, &w, bias, labels, 1.0).unwrap();
                let stored = logits(&h, &w, bias).unwrap();
                assert_eq!(bits(&stored), bits(&linear(&h, &w, bias).unwrap()));
                for (name, whole, part) in [
                    ("logp", &out.logp, &part.logp),
                    ("entropy", &out.entropy, &part.entropy),
                    ("lse", &out.lse, &part.lse),
                ] {
                    assert_eq!(bits(whole)[first..first + count], bits(part), "{name} of {count} rows");
                }
                let (logp, entropy, lse) = (flat(&part.logp), flat(&part.entropy), flat(&part.lse));
                for (row, logits) in stored.to_vec2::<f32>().unwrap().iter().enumerate() {
                    let stats = row_stats(logits);
                    let sampled = stats.log_prob(logits[labels[row] as usize]);
                    assert_eq!(sampled.to_bits(), logp[row].to_bits());
                    assert_eq!(stats.entropy.to_bits(), entropy[row].to_bits());
                    assert_eq!(stats.lse.to_bits(), lse[row].to_bits());
                }
            }
        }
    }
}

#[test]
fn more_rows_than_a_tile_do_not_matter() {
    let case = Case::new(2500, 8, 600);
    let (h, w, _) = case.tensors();
    let whole = bits(&case.forward().logp);
    let dh = case.backward(true)[0].clone();
    for first in [0, 1000, 1023, 1024, 2048, 2499] {
        let h = h.narrow(0, first, 1).unwrap();
        let labels = [case.labels[first]];
        let out = head_logprob(&h, &w, None, &labels, 1.0).unwrap();
        assert_eq!(bits(&out.logp)[0], whole[first]);
        let dw = Tensor::zeros((600, 8), DType::F32, &Device::Cpu).unwrap();
        let (dlogp, dentropy) = (tensor(&case.dlogp[first..=first], &[1]), tensor(&case.dentropy[first..=first], &[1]));
        let alone = head_logprob_backward(&dlogp, Some(&dentropy), &h, &w, None, &labels, &out, &dw, None).unwrap();
        let expected = &dh[first * 8..first * 8 + 8];
        assert!(flat(&alone).iter().zip(expected).all(|(a, b)| a.to_bits() == b.to_bits()));
    }
}

#[test]
fn threads_do_not_matter() {
    for case in [Case::new(70, 48, 3000).with_bias(), Case::new(900, 20, 1100).at_temperature(0.7)] {
        let on = |threads| {
            with_threads(threads, || {
                let out = case.forward();
                let grads = case.backward(true).map(|grad| grad.into_iter().map(f32::to_bits).collect::<Vec<_>>());
                (bits(&out.logp), bits(&out.entropy), grads)
            })
        };
        assert_eq!(on(1), on(3), "{} rows", case.rows);
    }
}

#[test]
fn no_rows_is_no_work() {
    let w = tensor(&[1.0, 2.0], &[2, 1]);
    let h = Tensor::zeros((0, 1), DType::F32, &Device::Cpu).unwrap();
    let none = Tensor::zeros(0, DType::F32, &Device::Cpu).unwrap();
    let out = head_logprob(&h, &w, None, &[], 1.0).unwrap();
    assert_eq!(out.logp.dims(), [0]);
    let dw = tensor(&[3.0, 4.0], &[2, 1]);
    let dh = head_logprob_backward(&none, None, &h, &w, None, &[], &out, &dw, None).unwrap();
    assert_eq!((dh.dims(), flat(&dw)), (&[0, 1][..], vec![3.0, 4.0]));
    assert_eq!(logits(&h, &w, None).unwrap().dims(), [0, 2]);
}

#[test]
fn refusals_say_what_is_wrong() {
    let (h, w, _) = Case::new(2, 3, 4).tensors();
    let message =
        |labels: &[u32], h: &Tensor, w: &Tensor| head_logprob(h, w, None, labels, 1.0).unwrap_err().to_string();
    assert_eq!(message(&[0, 4], &h, &w), "head_logprob: label 4 is out of range (limit 4)");
    assert!(message(&[0], &h, &w).contains("labels must be [2], got [1]"));
    assert!(message(&[0, 1], &h, &tensor(&[0.0; 8], &[4, 2])).contains("w must be [V, 3]"));
    assert!(message(&[0, 1], &tensor(&[0.0; 6], &[6]), &w).contains("[N, d] and [V, d]"));
}
