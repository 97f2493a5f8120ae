//! The head, the sampler, the optimizer and the reductions on every instruction set: AVX2 and AVX-512 give the same
//! bits, the portable path agrees within rounding.
//!
//! One test in its own binary, because the choice of instruction set is process-wide.

mod common;

use candle_core::Tensor;
use common::{assert_close, bits, flat, random, wide, zeros};
use tandem_kernels::Isa;
use tandem_kernels::logprob::{head_logprob, head_logprob_backward, logits};
use tandem_kernels::optimizer::{AdamWConfig, adamw_step, ema_update};
use tandem_kernels::reduce::{sum, sum_squares};
use tandem_kernels::sample::{SamplingParams, sample_row};

const ROWS: usize = 33;
const WIDTH: usize = 45;
const VOCABULARY: usize = 1333;
/// So many that tasks take the rows of a head by themselves.
const MANY_ROWS: usize = 300;

/// Everything computed; the f64 results, which no instruction set may change, apart.
fn run() -> (Vec<Tensor>, [u64; 2]) {
    let (h, w, bias) = (random(&[ROWS, WIDTH], 1), random(&[VOCABULARY, WIDTH], 2), random(&[VOCABULARY], 3));
    let (dlogp, dentropy) = (random(&[ROWS], 4), random(&[ROWS], 5));
    let (dw, dbias) = (zeros(&[VOCABULARY, WIDTH]), zeros(&[VOCABULARY]));
    let labels: Vec<u32> = (0..ROWS as u32).map(|row| row * 40).collect();
    let head = head_logprob(&h, &w, Some(&bias), &labels, 0.8).unwrap();
    let dh =
        head_logprob_backward(&dlogp, Some(&dentropy), &h, &w, Some(&bias), &labels, &head, &dw, Some(&dbias)).unwrap();

    let many = random(&[MANY_ROWS, WIDTH], 10);
    let many_labels: Vec<u32> = (0..MANY_ROWS as u32).map(|row| row * 4).collect();
    let many_dlogp = random(&[MANY_ROWS], 11);
    let many_dw = zeros(&[VOCABULARY, WIDTH]);
    let many_out = head_logprob(&many, &w, None, &many_labels, 1.0).unwrap();
    let many_dh =
        head_logprob_backward(&many_dlogp, None, &many, &w, None, &many_labels, &many_out, &many_dw, None).unwrap();

    let params = SamplingParams { temperature: 0.7, top_k: 40, top_p: 0.9, ..SamplingParams::default() };
    let row = flat(&logits(&h.narrow(0, 3, 1).unwrap(), &w, None).unwrap());
    let sampled = sample_row(&row, &[1, 2], &params, 0.4).unwrap();
    let log_probs = Tensor::new(&[sampled.logp, sampled.sampling_logp, sampled.entropy], h.device()).unwrap();

    let (param, m, v) = (random(&[1001], 6), random(&[1001], 7), random(&[1001], 8).sqr().unwrap());
    adamw_step(&param, &random(&[1001], 9), &m, &v, 1e-3, 0.1, 5, 0.5, &AdamWConfig::default()).unwrap();
    ema_update(&m, &param, 0.99).unwrap();
    let sums = [sum(&h).unwrap().to_bits(), sum_squares(&h).unwrap().to_bits()];
    let many = [many_out.logp, many_out.entropy, many_dh, many_dw];
    let few = [head.logp, head.entropy, head.lse, dh, dw, dbias, log_probs, param, m, v];
    (few.into_iter().chain(many).collect(), sums)
}

#[test]
fn instruction_sets_agree() {
    assert!(Isa::Portable.force());
    let (portable, portable_sums) = run();
    let mut fused: Option<Vec<Vec<u32>>> = None;
    for isa in [Isa::Avx2, Isa::Avx512] {
        if !isa.force() {
            continue;
        }
        let (got, sums) = run();
        assert_eq!(sums, portable_sums, "{isa:?}");
        for (index, (got, want)) in got.iter().zip(&portable).enumerate() {
            assert_close(&flat(got), &wide(&flat(want)), 2e-5, &format!("{isa:?} output {index}"));
        }
        let got: Vec<_> = got.iter().map(bits).collect();
        if let Some(before) = &fused {
            assert_eq!(&got, before, "AVX2 and {isa:?} differ");
        }
        fused = Some(got);
    }
}
