//! The sampler: against the f64 twin, by frequency, and at its edges.

mod common;

use candle_core::{Device, Tensor};
use common::wide;
use tandem_kernels::logprob::{head_logprob, logits};
use tandem_kernels::reference::{logprob::log_softmax, sample::sampling_probabilities};
use tandem_kernels::rng::{Philox, Purpose};
use tandem_kernels::sample::{SampleRequest, SamplingParams, sample_row, sample_rows};

const HISTORY: [u32; 5] = [0, 3, 3, 5, 8];

fn random(len: usize, std: f64) -> Vec<f32> {
    let mut values = vec![0f32; len];
    Philox::new(8, Purpose::Init, 0).fill_normal(len as u64, 0, std, &mut values);
    values
}

fn uniform(index: u64) -> f64 {
    Philox::new(8, Purpose::Sample, 0).uniform(index, 0, 0)
}

fn settings() -> Vec<SamplingParams> {
    let plain = SamplingParams::default();
    vec![
        plain,
        SamplingParams { temperature: 0.6, ..plain },
        SamplingParams { temperature: 1.7, repetition_penalty: 1.3, ..plain },
        SamplingParams { top_k: 5, ..plain },
        SamplingParams { top_p: 0.8, ..plain },
        SamplingParams { min_p: 0.1, ..plain },
        SamplingParams { temperature: 1.3, top_k: 12, top_p: 0.9, min_p: 0.05, repetition_penalty: 0.8 },
    ]
}

/// Frequencies over many uniform numbers are those of the twin's distribution.
#[test]
fn draws_follow_the_distribution() {
    let logits = random(40, 1.5);
    for params in settings() {
        let expected = sampling_probabilities(&wide(&logits), &HISTORY, &params);
        let draws = 40_000;
        let mut counts = vec![0f64; logits.len()];
        for index in 0..draws {
            counts[sample_row(&logits, &HISTORY, &params, uniform(index)).unwrap().token as usize] += 1.0;
        }
        let (mut chi_square, mut bins) = (0.0, -1.0);
        for (count, probability) in counts.iter().zip(&expected) {
            let mean = probability * draws as f64;
            assert!(mean > 0.0 || *count == 0.0, "{params:?}: an excluded token was drawn");
            if mean > 5.0 {
                chi_square += (count - mean).powi(2) / mean;
                bins += 1.0;
            }
        }
        // Mean and four standard deviations of the chi-square distribution.
        let bound: f64 = bins + 4.0 * f64::sqrt(2.0 * bins);
        assert!(chi_square < bound, "{params:?}: {chi_square} over {bound}");
    }
}

/// A grid of uniform numbers inverts the twin's cumulative distribution, and the log-probabilities are the twin's.
#[test]
fn choices_and_log_probs_match_the_twin() {
    for vocabulary in [1, 2, 9, 511, 513, 3000] {
        let logits = random(vocabulary, 2.0);
        let history: Vec<u32> = HISTORY.into_iter().filter(|&token| (token as usize) < vocabulary).collect();
        let raw = log_softmax(&wide(&logits));
        for params in settings() {
            let probabilities = sampling_probabilities(&wide(&logits), &history, &params);
            for step in 0..200 {
                let u = (step as f64 + 0.5) / 200.0;
                let got = sample_row(&logits, &history, &params, u).unwrap();
                let token = got.token as usize;
                let below: f64 = probabilities[..token].iter().sum();
                assert!(below < u + 1e-5 && u < below + probabilities[token] + 1e-5, "{params:?} {u}: {token}");
                assert!((f64::from(got.logp) - raw[token]).abs() < 3e-6 * (1.0 - raw[token]));
                let sampling = probabilities[token].ln();
                assert!((f64::from(got.sampling_logp) - sampling).abs() < 5e-6 * (1.0 - sampling), "{params:?}");
            }
        }
    }
}

/// What is recorded while sampling is what training computes, bit for bit.
#[test]
fn log_probs_are_those_of_the_head() {
    let (width, vocabulary, rows) = (24, 1300, 9);
    let h = Tensor::from_vec(random(rows * width, 1.0), (rows, width), &Device::Cpu).unwrap();
    let w = Tensor::from_vec(random(vocabulary * width, 0.4), (vocabulary, width), &Device::Cpu).unwrap();
    let stored = logits(&h, &w, None).unwrap();
    for params in settings() {
        let requests: Vec<SampleRequest> = (0..rows as u64)
            .map(|row| SampleRequest { history: &HISTORY, params: &params, uniform: uniform(row) })
            .collect();
        let sampled = sample_rows(&stored, &requests).unwrap();
        let tokens: Vec<u32> = sampled.iter().map(|sampled| sampled.token).collect();
        let out = head_logprob(&h, &w, None, &tokens, 1.0).unwrap();
        let (logp, entropy) = (out.logp.to_vec1::<f32>().unwrap(), out.entropy.to_vec1::<f32>().unwrap());
        for (row, got) in sampled.iter().enumerate() {
            assert_eq!(got.logp.to_bits(), logp[row].to_bits());
            assert_eq!(got.entropy.to_bits(), entropy[row].to_bits());
            if params.is_plain() {
                assert_eq!(got.sampling_logp.to_bits(), got.logp.to_bits());
            }
        }
    }
}

#[test]
fn greedy_takes_the_first_of_the_largest() {
    let mut logits = random(700, 1.0);
    logits[600] = 9.0;
    logits[650] = 9.0;
    let only_best = [
        SamplingParams::greedy(),
        SamplingParams { top_k: 1, ..Default::default() },
        SamplingParams { top_p: 1e-6, ..Default::default() },
    ];
    for params in only_best {
        for u in [0.0, 0.3, 0.999_999] {
            let got = sample_row(&logits, &[], &params, u).unwrap();
            assert_eq!((got.token, got.sampling_logp), (600, 0.0), "{params:?}");
            assert!(got.logp < -0.5, "the policy's own log-probability is not that of a certain choice");
        }
    }
    // The penalty applies to greedy choices too.
    let params = SamplingParams { repetition_penalty: 2.0, ..SamplingParams::greedy() };
    assert_eq!(sample_row(&logits, &[600, 600], &params, 0.0).unwrap().token, 650);
}

#[test]
fn equal_logits_split_the_line_evenly() {
    let logits = vec![0.25f32; 1000];
    for (params, kept) in [
        (SamplingParams::default(), 1000.0),
        (SamplingParams { top_k: 10, ..Default::default() }, 10.0),
        (SamplingParams { top_p: 0.125, ..Default::default() }, 125.0),
        (SamplingParams { min_p: 1.0, ..Default::default() }, 1000.0),
    ] {
        for u in [0.0, 0.105, 0.505, 0.999_999] {
            let got = sample_row(&logits, &[], &params, u).unwrap();
            assert_eq!(got.token, (u * kept) as u32, "{params:?} {u}");
            assert!((f64::from(got.sampling_logp) + f64::ln(kept)).abs() < 1e-6);
        }
    }
}

#[test]
fn a_uniform_number_just_below_one_still_chooses() {
    let below_one = 1.0 - f64::EPSILON / 2.0;
    for vocabulary in [1, 7, 512, 3000] {
        let mut logits = random(vocabulary, 3.0);
        // Weights that underflow must not be chosen at either end.
        if vocabulary > 7 {
            logits[0] = -1e4;
            logits[vocabulary - 1] = -1e4;
        }
        for params in settings() {
            for u in [0.0, below_one] {
                let got = sample_row(&logits, &[], &params, u).unwrap();
                assert!(got.sampling_logp.is_finite(), "{params:?} {u}: {got:?}");
            }
        }
    }
}

#[test]
fn tiny_temperatures_are_greedy_in_the_limit() {
    let logits = random(300, 1.0);
    let greedy = sample_row(&logits, &[], &SamplingParams::greedy(), 0.5).unwrap().token;
    let params = SamplingParams { temperature: f32::MIN_POSITIVE, ..Default::default() };
    let got = sample_row(&logits, &[], &params, 0.999).unwrap();
    assert_eq!((got.token, got.sampling_logp), (greedy, 0.0));
}

#[test]
fn refuses_bad_logits_and_parameters() {
    let plain = SamplingParams::default();
    let message = |logits: &[f32], history: &[u32], params: &SamplingParams, u| {
        sample_row(logits, history, params, u).unwrap_err().to_string()
    };
    assert_eq!(message(&[0.0, f32::NAN], &[], &plain, 0.5), "sample_row: the logit of token 1 is NaN");
    assert!(message(&[f32::INFINITY], &[], &plain, 0.5).contains("token 0 is inf"));
    assert!(message(&[0.0], &[1], &plain, 0.5).contains("token of the history 1 is out of range"));
    assert!(message(&[], &[], &plain, 0.5).contains("at least one"));
    assert!(message(&[0.0], &[], &plain, 1.0).contains("uniform must be in [0, 1)"));
    for (params, field) in [
        (SamplingParams { temperature: -1.0, ..plain }, "temperature"),
        (SamplingParams { temperature: f32::NAN, ..plain }, "temperature"),
        (SamplingParams { top_p: 0.0, ..plain }, "top_p"),
        (SamplingParams { top_p: 1.5, ..plain }, "top_p"),
        (SamplingParams { min_p: -0.1, ..plain }, "min_p"),
        (SamplingParams { repetition_penalty: 0.0, ..plain }, "repetition_penalty"),
    ] {
        assert!(message(&[0.0], &[], &params, 0.5).contains(field), "{params:?}");
        assert!(params.validate().is_err());
    }
}
