//! The head cut into shards of the vocabulary: against its f64 twin, finite differences, and itself uncut.

mod common;

use candle_core::Tensor;
use common::{bits, flat, random, tensor, wide, with_threads, zeros};
use tandem_kernels::logprob::{
    HeadOut, HeadPartial, head_finish, head_logprob, head_logprob_backward, head_partials, head_shard_backward,
    head_shard_input_grad, logits, row_partial, row_stats,
};
use tandem_kernels::reference::logprob as twin;

const ROWS: usize = 9;
const WIDTH: usize = 13;
const INV_TEMPERATURE: f32 = 1.0 / 0.8;

/// A head and rows whose labels lie in every shard.
struct Case {
    h: Tensor,
    w: Tensor,
    bias: Option<Tensor>,
    labels: Vec<u32>,
    dlogp: Tensor,
    dentropy: Tensor,
}

/// One shard as a rank holds it: its first entry, weights and bias, each with a storage of its own.
struct Shard {
    first_entry: usize,
    w: Tensor,
    bias: Option<Tensor>,
}

impl Case {
    fn new(vocabulary: usize, with_bias: bool) -> Self {
        Self {
            h: random(&[ROWS, WIDTH], 1),
            w: random(&[vocabulary, WIDTH], 2),
            bias: with_bias.then(|| random(&[vocabulary], 3)),
            labels: (0..ROWS).map(|row| (row * (vocabulary - 1) / (ROWS - 1)) as u32).collect(),
            dlogp: random(&[ROWS], 4),
            dentropy: random(&[ROWS], 5),
        }
    }

    fn shards(&self, cuts: &[usize]) -> Vec<Shard> {
        let part = |t: &Tensor, range: &[usize]| t.narrow(0, range[0], range[1] - range[0]).unwrap().copy().unwrap();
        cuts.windows(2)
            .map(|range| Shard {
                first_entry: range[0],
                w: part(&self.w, range),
                bias: self.bias.as_ref().map(|bias| part(bias, range)),
            })
            .collect()
    }

    fn partials(&self, shard: &Shard) -> Vec<HeadPartial> {
        let bias = shard.bias.as_ref();
        head_partials(&self.h, &shard.w, bias, shard.first_entry, &self.labels, INV_TEMPERATURE).unwrap()
    }

    fn forward(&self, cuts: &[usize]) -> HeadOut {
        let parts: Vec<_> = self.shards(cuts).iter().map(|shard| self.partials(shard)).collect();
        head_finish(&merged(&parts), INV_TEMPERATURE).unwrap()
    }

    /// (dh per shard, dw, dbias), the last two of all shards end to end.
    fn backward(&self, cuts: &[usize]) -> (Vec<Tensor>, Vec<f32>, Vec<f32>) {
        let out = self.forward(cuts);
        let (mut dhs, mut dws, mut dbiases) = (Vec::new(), Vec::new(), Vec::new());
        for shard in self.shards(cuts) {
            let entries = shard.w.dims()[0];
            let (dw, dbias) = (zeros(&[entries, WIDTH]), zeros(&[entries]));
            let dbias_arg = shard.bias.is_some().then_some(&dbias);
            let (bias, first, labels) = (shard.bias.as_ref(), shard.first_entry, &self.labels);
            let (dlogp, dentropy) = (&self.dlogp, Some(&self.dentropy));
            let dh = head_shard_backward(dlogp, dentropy, &self.h, &shard.w, bias, first, labels, &out, &dw, dbias_arg);
            dhs.push(dh.unwrap());
            dws.extend(flat(&dw));
            dbiases.extend(flat(&dbias));
        }
        (dhs, dws, dbiases)
    }

    /// `Σ dlogp · logp + dentropy · entropy` by the twin, with the inputs moved.
    fn objective(&self, h: &[f64], w: &[f64], bias: &[f64]) -> f64 {
        let (dlogp, dentropy) = (flat(&self.dlogp), flat(&self.dentropy));
        let rows = h.chunks(WIDTH).enumerate();
        rows.map(|(row, h)| {
            let logits = twin::logits(h, w, bias, f64::from(INV_TEMPERATURE));
            let logp = twin::log_softmax(&logits)[self.labels[row] as usize];
            f64::from(dlogp[row]) * logp + f64::from(dentropy[row]) * twin::entropy(&logits)
        })
        .sum()
    }
}

/// The partials of each row, shards in order.
fn merged(parts: &[Vec<HeadPartial>]) -> Vec<HeadPartial> {
    (0..parts[0].len()).map(|row| parts.iter().fold(HeadPartial::EMPTY, |seen, shard| seen.merge(shard[row]))).collect()
}

fn out_bits(out: &HeadOut) -> [Vec<u32>; 3] {
    [bits(&out.logp), bits(&out.entropy), bits(&out.lse)]
}

fn f32_bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Two and three shards, the last one ragged; and shards of a vocabulary too small for them, which stay empty.
fn cut_cases() -> Vec<(Case, Vec<usize>)> {
    vec![
        (Case::new(1300, false), vec![0, 1024, 1300]),
        (Case::new(1300, true), vec![0, 512, 1024, 1300]),
        (Case::new(5200, true), vec![0, 2560, 5200]),
        (Case::new(300, true), vec![0, 300, 300]),
        (Case::new(300, false), vec![0, 0, 0, 300]),
    ]
}

#[test]
fn shards_match_the_twin() {
    for (case, cuts) in cut_cases() {
        let (out, w) = (case.forward(&cuts), wide(&flat(&case.w)));
        let bias = case.bias.as_ref().map(|bias| wide(&flat(bias))).unwrap_or_default();
        let (logp, entropy, lse) = (flat(&out.logp), flat(&out.entropy), flat(&out.lse));
        for (row, h) in wide(&flat(&case.h)).chunks(WIDTH).enumerate() {
            let logits = twin::logits(h, &w, &bias, f64::from(INV_TEMPERATURE));
            let (expected, label) = (twin::log_softmax(&logits), case.labels[row] as usize);
            for (name, got, want) in [
                ("logp", logp[row], expected[label]),
                ("entropy", entropy[row], twin::entropy(&logits)),
                ("lse", lse[row], logits[label] - expected[label]),
            ] {
                let error = (f64::from(got) - want).abs();
                assert!(error < 3e-6 * (1.0 + want.abs()), "{cuts:?} row {row} {name}: {got} {want}");
            }
        }
    }
}

#[test]
fn shard_backward_matches_finite_differences() {
    for (case, cuts) in cut_cases() {
        let (dhs, dw, dbias) = case.backward(&cuts);
        let mut dh = vec![0.0; ROWS * WIDTH];
        for part in &dhs {
            dh.iter_mut().zip(flat(part)).for_each(|(total, term)| *total += term);
        }
        let grads = [dh, dw, dbias];
        let bias = case.bias.as_ref().map(|bias| wide(&flat(bias))).unwrap_or_default();
        let mut inputs = [wide(&flat(&case.h)), wide(&flat(&case.w)), bias];
        for which in 0..3 {
            let len = inputs[which].len();
            for index in (0..len).step_by((len / 17).max(1)) {
                let value = inputs[which][index];
                let mut at = |moved: f64| {
                    inputs[which][index] = moved;
                    let [h, w, bias] = &inputs;
                    case.objective(h, w, bias)
                };
                let step = 1e-4;
                let want = (at(value + step) - at(value - step)) / (2.0 * step);
                at(value);
                let got = f64::from(grads[which][index]);
                assert!((got - want).abs() < 2e-5 * (1.0 + want.abs()), "{cuts:?} {which}[{index}]: {got} {want}");
            }
        }
    }
}

#[test]
fn one_shard_has_the_bits_of_the_whole_head() {
    for vocabulary in [7, 512, 1300] {
        let case = Case::new(vocabulary, true);
        let (h, w, bias) = (&case.h, &case.w, case.bias.as_ref());
        let whole = head_logprob(h, w, bias, &case.labels, INV_TEMPERATURE).unwrap();
        assert_eq!(out_bits(&case.forward(&[0, vocabulary])), out_bits(&whole));
        let (dw, dbias) = (zeros(&[vocabulary, WIDTH]), zeros(&[vocabulary]));
        let (dlogp, dentropy) = (&case.dlogp, Some(&case.dentropy));
        let dh = head_logprob_backward(dlogp, dentropy, h, w, bias, &case.labels, &whole, &dw, Some(&dbias)).unwrap();
        let (dhs, shard_dw, shard_dbias) = case.backward(&[0, vocabulary]);
        assert_eq!(bits(&dhs[0]), bits(&dh));
        let frozen = head_shard_input_grad(dlogp, dentropy, h, w, bias, 0, &case.labels, &whole).unwrap();
        assert_eq!(bits(&frozen), bits(&dh), "a head that is not trained");
        assert_eq!((f32_bits(&shard_dw), f32_bits(&shard_dbias)), (bits(&dw), bits(&dbias)));
    }
}

/// The shards' partials travel as arrays, are made on other thread counts and in any order, and merge to equal bits.
#[test]
fn who_holds_a_shard_does_not_matter() {
    for (case, cuts) in cut_cases() {
        let here = out_bits(&case.forward(&cuts));
        let shards = case.shards(&cuts);
        let mut parts: Vec<(usize, Vec<[f64; 4]>)> = with_threads(3, || {
            let computed = shards.iter().enumerate().rev();
            computed.map(|(at, shard)| (at, case.partials(shard).iter().map(|p| p.to_array()).collect())).collect()
        });
        parts.sort_by_key(|&(at, _)| at);
        let received: Vec<Vec<HeadPartial>> =
            parts.into_iter().map(|(_, part)| part.into_iter().map(HeadPartial::from_array).collect()).collect();
        assert_eq!(out_bits(&head_finish(&merged(&received), INV_TEMPERATURE).unwrap()), here, "{cuts:?}");
        // The gradient of a shard's weights is that of the whole head: its rows see the same sums.
        let (_, dw, _) = case.backward(&cuts);
        let (_, again, _) = with_threads(3, || case.backward(&cuts));
        assert_eq!(f32_bits(&dw), f32_bits(&again));
    }
}

/// What a sampler makes of the stored logits of a shard is what the head makes of its hidden rows.
#[test]
fn row_partials_are_those_of_the_head() {
    let case = Case::new(1300, true);
    let cuts = [0, 512, 1300];
    let shards = case.shards(&cuts);
    let whole = logits(&case.h, &case.w, case.bias.as_ref()).unwrap().to_vec2::<f32>().unwrap();
    let parts: Vec<Vec<HeadPartial>> = shards
        .iter()
        .map(|shard| head_partials(&case.h, &shard.w, shard.bias.as_ref(), shard.first_entry, &case.labels, 1.0))
        .collect::<Result<_, _>>()
        .unwrap();
    let out = head_finish(&merged(&parts), 1.0).unwrap();
    let stored: Vec<Vec<Vec<f32>>> =
        shards.iter().map(|shard| logits(&case.h, &shard.w, shard.bias.as_ref()).unwrap().to_vec2().unwrap()).collect();
    for row in 0..ROWS {
        let joined: Vec<f32> = stored.iter().flat_map(|shard| shard[row].clone()).collect();
        assert_eq!(f32_bits(&joined), f32_bits(&whole[row]), "a shard's logits are the head's");
        let stats = row_partial(&stored[0][row]).merge(row_partial(&stored[1][row])).finish();
        let logp = stats.log_prob(joined[case.labels[row] as usize]);
        assert_eq!(logp.to_bits(), bits(&out.logp)[row]);
        assert_eq!(stats.entropy.to_bits(), bits(&out.entropy)[row]);
        assert_eq!(stats.lse.to_bits(), bits(&out.lse)[row]);
        assert!((stats.lse - row_stats(&joined).lse).abs() < 1e-5);
    }
}

#[test]
fn a_shard_without_entries_changes_nothing() {
    let (h, w) = (random(&[ROWS, WIDTH], 1), zeros(&[0, WIDTH]));
    assert_eq!(logits(&h, &w, Some(&zeros(&[0]))).unwrap().dims(), [ROWS, 0]);
    let empty = head_partials(&h, &w, None, 512, &[3; ROWS], 1.0).unwrap()[0];
    let some = row_partial(&[1.0, -2.0]);
    for merged in [empty.merge(some), some.merge(empty)] {
        assert_eq!(merged.to_array().map(f64::to_bits)[..3], some.to_array().map(f64::to_bits)[..3]);
    }
    let out = head_logprob(&h, &random(&[4, WIDTH], 2), None, &[3; ROWS], 1.0).unwrap();
    let dh =
        head_shard_backward(&out.logp, None, &h, &w, None, 512, &[3; ROWS], &out, &zeros(&[0, WIDTH]), None).unwrap();
    assert_eq!(flat(&dh), vec![0.0; ROWS * WIDTH]);
}

#[test]
fn refusals_say_what_is_wrong() {
    let (h, w) = (random(&[2, 3], 1), random(&[600, 3], 2));
    let message = |first, labels: &[u32]| head_partials(&h, &w, None, first, labels, 1.0).unwrap_err().to_string();
    assert_eq!(message(100, &[0, 1]), "head_partials: first_entry must be a multiple of 512, got 100");
    assert!(message(0, &[0]).contains("labels must be [2], got [1]"));
    let partials = head_partials(&h, &w, None, 512, &[512, 3], 1.0).unwrap();
    let missing = head_finish(&partials, 1.0).unwrap_err().to_string();
    assert_eq!(missing, "head_finish: every label must be an entry of one of the shards, got none for row 1");
    // A model that has diverged is for the caller's health checks to see, not an error of the labels.
    let poisoned = tensor(&[f32::NAN; 6], &[2, 3]);
    let out = head_finish(&head_partials(&h, &poisoned, None, 0, &[0, 1], 1.0).unwrap(), 1.0).unwrap();
    assert!(flat(&out.logp).iter().all(|logp| logp.is_nan()));
}
