//! The head with bf16 rows and weights: against its f64 twin on the rounded inputs, and itself under other batches,
//! threads, shards and callers.

mod common;

use candle_core::{DType, Tensor};
use common::{bits, flat, random, tensor, wide, with_threads, zeros};
use tandem_kernels::gemm::{PackedMatrix, linear_f32};
use tandem_kernels::logprob::{
    HeadOut, HeadPartial, head_finish, head_logprob, head_logprob_backward, head_partials, head_shard_backward,
    head_shard_input_grad, logits, logits_packed, row_stats,
};
use tandem_kernels::reference::logprob as twin;

/// As in the programs: large blocks start at a cache line, so that tiles can load rows where they lie.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const INV_TEMPERATURE: f32 = 1.0 / 0.8;
/// Rounding of bf16: its significand has 8 bits.
const HALF_UNIT: f64 = 1.0 / (1u64 << 8) as f64;

struct Case {
    rows: usize,
    width: usize,
    vocabulary: usize,
    h: Tensor,
    w: Tensor,
    bias: Option<Tensor>,
    labels: Vec<u32>,
    dlogp: Tensor,
    dentropy: Tensor,
}

impl Case {
    fn new(rows: usize, width: usize, vocabulary: usize, bias: Option<DType>) -> Self {
        let half = |shape: &[usize], seed| random(shape, seed).to_dtype(DType::BF16).unwrap();
        Self {
            rows,
            width,
            vocabulary,
            h: half(&[rows, width], 1),
            w: half(&[vocabulary, width], 2),
            bias: bias.map(|dtype| random(&[vocabulary], 3).to_dtype(dtype).unwrap()),
            labels: (0..rows).map(|row| (row * 7919 % vocabulary) as u32).collect(),
            dlogp: random(&[rows], 4),
            dentropy: random(&[rows], 5),
        }
    }

    fn forward(&self) -> HeadOut {
        head_logprob(&self.h, &self.w, self.bias.as_ref(), &self.labels, INV_TEMPERATURE).unwrap()
    }

    /// (dh, dw, dbias), the last two added to zeros.
    fn backward(&self) -> [Tensor; 3] {
        let (dw, dbias) = (zeros(&[self.vocabulary, self.width]), zeros(&[self.vocabulary]));
        let dbias_arg = self.bias.is_some().then_some(&dbias);
        let (labels, out, bias) = (&self.labels, self.forward(), self.bias.as_ref());
        let (dlogp, dentropy) = (&self.dlogp, Some(&self.dentropy));
        let dh = head_logprob_backward(dlogp, dentropy, &self.h, &self.w, bias, labels, &out, &dw, dbias_arg).unwrap();
        [dh, dw, dbias]
    }

    /// The rounded inputs, exactly: h, w, bias.
    fn exact(&self) -> [Vec<f64>; 3] {
        let values = |t: &Tensor| wide(&flat(&t.to_dtype(DType::F32).unwrap()));
        [values(&self.h), values(&self.w), self.bias.as_ref().map(values).unwrap_or_default()]
    }
}

fn cases() -> Vec<Case> {
    vec![
        Case::new(1, 1, 1, None),
        Case::new(3, 5, 7, Some(DType::BF16)),
        Case::new(5, 17, 513, Some(DType::F32)),
        Case::new(70, 33, 2600, None),
        Case::new(1030, 3, 11, Some(DType::BF16)),
        // Enough rows for tasks that use the logits in cache; two tiles, of rows and of entries.
        Case::new(1030, 7, 1030, None),
        Case::new(290, 64, 1100, None),
    ]
}

/// The logits are sums in f32 of exact products: the tolerance is that of the f32 head.
#[test]
fn forward_matches_the_twin() {
    for case in cases() {
        let ([h, w, bias], out) = (case.exact(), case.forward());
        let (logp, entropy, lse) = (flat(&out.logp), flat(&out.entropy), flat(&out.lse));
        for (row, h) in h.chunks(case.width).enumerate() {
            let logits = twin::logits(h, &w, &bias, f64::from(INV_TEMPERATURE));
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

/// Each gradient of a logit is rounded to bf16 once, so a sum of them times exact numbers is off by at most the rounding
/// times the sum of absolute terms; the bias gradient is not rounded. 1e-5 stands for the f32 steps.
#[test]
fn backward_matches_the_twin() {
    for case in cases() {
        let ([h, w, bias], grads) = (case.exact(), case.backward());
        let (dlogp, dentropy) = (wide(&flat(&case.dlogp)), wide(&flat(&case.dentropy)));
        let (width, vocabulary, factor) = (case.width, case.vocabulary, f64::from(INV_TEMPERATURE));
        let mut want = [vec![0.0; h.len()], vec![0.0; w.len()], vec![0.0; vocabulary]];
        let mut scale = want.clone();
        for row in 0..case.rows {
            let h = &h[row * width..(row + 1) * width];
            let logits = twin::logits(h, &w, &bias, factor);
            let (logp, entropy) = (twin::log_softmax(&logits), twin::entropy(&logits));
            for v in 0..vocabulary {
                let (p, hit) = (logp[v].exp(), f64::from(u8::from(case.labels[row] as usize == v)));
                let dl = factor * (dlogp[row] * (hit - p) - dentropy[row] * p * (logp[v] + entropy));
                want[2][v] += dl;
                scale[2][v] += dl.abs();
                for (j, h) in h.iter().enumerate() {
                    for (which, at, term) in [(0, row * width + j, dl * w[v * width + j]), (1, v * width + j, dl * h)] {
                        want[which][at] += term;
                        scale[which][at] += term.abs();
                    }
                }
            }
        }
        for (which, rounding) in [(0, HALF_UNIT), (1, HALF_UNIT), (2, 0.0)] {
            if which == 2 && case.bias.is_none() {
                continue;
            }
            for (at, got) in flat(&grads[which]).iter().enumerate() {
                let bound = (rounding + 1e-5) * (scale[which][at] + 1e-2);
                let error = (f64::from(*got) - want[which][at]).abs();
                assert!(error <= bound, "V {vocabulary} grad {which}[{at}]: {got} {} ({bound:.1e})", want[which][at]);
            }
        }
    }
}

/// Bitwise: a row alone, a row in any batch, packed weights, and the row as the sampler sees it.
#[test]
fn a_row_does_not_know_its_batch() {
    for (width, vocabulary, bias) in [(5, 7, None), (300, 3000, Some(DType::BF16)), (1100, 1025, Some(DType::F32))] {
        let case = Case::new(300, width, vocabulary, bias);
        let (w, bias) = (&case.w, case.bias.as_ref());
        let packed = PackedMatrix::new(w).unwrap();
        let whole = head_logprob(&case.h, w, bias, &case.labels, 1.0).unwrap();
        for count in [1, 2, 17, 40, 64, 65, 130, 300] {
            let first = (300 - count) / 2;
            let h = case.h.narrow(0, first, count).unwrap();
            let labels = &case.labels[first..first + count];
            let part = head_logprob(&h, w, bias, labels, 1.0).unwrap();
            let stored = logits(&h, w, bias).unwrap();
            assert_eq!(stored.dtype(), DType::F32);
            assert!(bits(&stored) == bits(&linear_f32(&h, w, bias).unwrap()));
            assert!(bits(&stored) == bits(&logits_packed(&h, &packed, bias).unwrap()));
            for (whole, part) in [(&whole.logp, &part.logp), (&whole.entropy, &part.entropy), (&whole.lse, &part.lse)] {
                assert_eq!(bits(whole)[first..first + count], bits(part), "{count} rows");
            }
            let logp = bits(&part.logp);
            for (row, logits) in stored.to_vec2::<f32>().unwrap().iter().enumerate() {
                let sampled = row_stats(logits).log_prob(logits[labels[row] as usize]);
                assert_eq!(sampled.to_bits(), logp[row]);
            }
        }
    }
}

#[test]
fn threads_do_not_matter() {
    for bias in [None, Some(DType::BF16)] {
        let case = Case::new(1100, 48, 2100, bias);
        let run = || (bits(&case.forward().logp), case.backward().map(|grad| bits(&grad)));
        let one = with_threads(1, run);
        assert!(one == with_threads(3, run));
    }
}

/// Without a bias the backward never stores the logits of a whole tile; with one of zeros it does.
#[test]
fn a_bias_of_zeros_changes_no_gradient() {
    for width in [45, 64] {
        let plain = Case::new(1100, width, 2100, None);
        let zero = Case { bias: Some(zeros(&[2100])), ..Case::new(1100, width, 2100, None) };
        let ([dh, dw, _], [dh_zero, dw_zero, _]) = (plain.backward(), zero.backward());
        assert!(bits(&dh) == bits(&dh_zero) && bits(&dw) == bits(&dw_zero), "width {width}");
    }
}

/// One shard has the bits of the whole head; the weights of a shard get the bits that they get in the whole head, given
/// the same sums of the rows; and the shards' gradients of `h` add up to it within the rounding of f32.
#[test]
fn shards_are_parts_of_the_whole() {
    let case = Case::new(70, 33, 1300, Some(DType::BF16));
    let (h, labels, dlogp, dentropy) = (&case.h, &case.labels, &case.dlogp, Some(&case.dentropy));
    let (out, [dh, dw, dbias]) = (case.forward(), case.backward());
    for cuts in [&[0, 1300][..], &[0, 512, 1300], &[0, 512, 1024, 1300]] {
        let mut parts = vec![HeadPartial::EMPTY; case.rows];
        let (mut dws, mut dbiases, mut dh_sum) = (Vec::new(), Vec::new(), vec![0f64; case.rows * case.width]);
        for range in cuts.windows(2) {
            let (first, entries) = (range[0], range[1] - range[0]);
            let w = case.w.narrow(0, first, entries).unwrap();
            let bias = case.bias.as_ref().map(|bias| bias.narrow(0, first, entries).unwrap());
            let bias = bias.as_ref();
            let shard = head_partials(h, &w, bias, first, labels, INV_TEMPERATURE).unwrap();
            parts.iter_mut().zip(shard).for_each(|(seen, shard)| *seen = seen.merge(shard));
            let (dw, dbias) = (zeros(&[entries, case.width]), zeros(&[entries]));
            let part =
                head_shard_backward(dlogp, dentropy, h, &w, bias, first, labels, &out, &dw, Some(&dbias)).unwrap();
            let frozen = head_shard_input_grad(dlogp, dentropy, h, &w, bias, first, labels, &out).unwrap();
            assert_eq!((part.dtype(), bits(&part)), (DType::F32, bits(&frozen)));
            dh_sum.iter_mut().zip(wide(&flat(&part))).for_each(|(total, term)| *total += term);
            dws.extend(bits(&dw));
            dbiases.extend(bits(&dbias));
        }
        assert!(dws == bits(&dw) && dbiases == bits(&dbias), "{cuts:?}");
        for (got, want) in dh_sum.iter().zip(wide(&flat(&dh))) {
            assert!((got - want).abs() < 1e-5 * (1.0 + want.abs()), "{cuts:?}: {got} {want}");
        }
        let joined = head_finish(&parts, INV_TEMPERATURE).unwrap();
        if cuts.len() == 2 {
            assert_eq!(bits(&joined.logp), bits(&out.logp));
        }
        for (got, want) in flat(&joined.logp).iter().zip(wide(&flat(&out.logp))) {
            assert!((f64::from(*got) - want).abs() < 1e-6 * (1.0 + want.abs()));
        }
    }
}

#[test]
fn types_that_do_not_fit_are_refused() {
    let case = Case::new(2, 3, 4, None);
    let full = tensor(&[0.0; 6], &[2, 3]);
    assert!(logits(&full, &case.w, None).unwrap_err().to_string().contains("F32"));
    let packed = PackedMatrix::new(&case.w).unwrap();
    assert!(logits_packed(&full, &packed, None).unwrap_err().to_string().starts_with("logits_packed"));
    let (w, half_bias) = (case.w.to_dtype(DType::F32).unwrap(), zeros(&[4]).to_dtype(DType::BF16).unwrap());
    assert!(head_logprob(&full, &w, Some(&half_bias), &[0, 1], 1.0).is_err());
}
