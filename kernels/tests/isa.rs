//! AVX2 and AVX-512 give the same bits; the portable path agrees within rounding.
//!
//! One test in its own binary, because the choice of instruction set is process-wide.

mod common;

use candle_core::{DType, Tensor};
use common::{assert_close, bits, flat, random, wide, zeros};
use tandem_kernels::Isa;
use tandem_kernels::attention::{AttentionSpec, KvCacheLayer, attention, attention_backward, decode_attention};
use tandem_kernels::dropout::dropout;
use tandem_kernels::gemm::linear_weight_grad;
use tandem_kernels::mlp::{Activation, activation, activation_backward, gated, gated_backward, gated_backward_again};
use tandem_kernels::norm::{
    add_layer_norm, add_rms_norm, layer_norm, layer_norm_backward, layer_norm_backward_add, rms_norm,
    rms_norm_backward, rms_norm_backward_add,
};
use tandem_kernels::rng::{Philox, Purpose};
use tandem_kernels::rope::{RopeTable, rope_qkv};
use tandem_kernels::slice::{to_bf16, to_f32};

/// Every kernel of this crate's transformer block, on odd shapes.
fn run() -> Vec<Tensor> {
    let mut out = Vec::new();
    let (x, dy, w, b) = (random(&[70, 77], 1), random(&[70, 77], 2), random(&[77], 3), random(&[77], 4));
    let (dw, db) = (zeros(&[77]), zeros(&[77]));
    let (y, stats) = rms_norm(&x, &w, 1e-5).unwrap();
    out.extend([y, rms_norm_backward(&dy, &x, &w, &stats, &dw).unwrap()]);
    let (y, stats) = layer_norm(&x, &w, &b, 1e-5).unwrap();
    out.extend([y, layer_norm_backward(&dy, &x, &w, &stats, &dw, &db).unwrap(), dw, db]);
    let gate_up = (random(&[70, 2 * 77], 5) * 4.0).unwrap();
    for act in [Activation::Silu, Activation::GeluTanh, Activation::GeluErf, Activation::Relu] {
        out.extend([gated(&gate_up, act).unwrap(), gated_backward(&dy, &gate_up, act).unwrap()]);
    }
    let (x, dy, dw) = (random(&[530, 75], 8), random(&[530, 100], 9), zeros(&[100, 75]));
    linear_weight_grad(&dy, &x, &dw).unwrap();
    out.push(dw);
    for (heads, kv_heads, head_dim, window) in [(2, 2, 64, None), (4, 2, 20, Some(40)), (3, 1, 80, None)] {
        let spec = AttentionSpec { heads, kv_heads, head_dim, causal: true, window, scale: 0.2 };
        let qkv = random(&[203, spec.qkv_width()], 6);
        let table = RopeTable::new(head_dim, 203, 1e4, None).unwrap();
        rope_qkv(&qkv, heads, kv_heads, &table, &(0..203).collect::<Vec<_>>(), false).unwrap();
        let (o, saved) = attention(&qkv, &[0, 133, 203], &spec).unwrap();
        let d_o = random(&[203, spec.output_width()], 7);
        out.push(attention_backward(&d_o, &qkv, &o, &saved, &[0, 133, 203], &spec).unwrap());
        let cache = KvCacheLayer::new(1, 203, kv_heads, head_dim, DType::F32).unwrap();
        cache.append(&qkv, heads, &(0..203).map(|t| (0, t)).collect::<Vec<_>>()).unwrap();
        let last = qkv.narrow(0, 202, 1).unwrap().copy().unwrap();
        out.push(decode_attention(&last, &cache, &[(0, 203)], &spec).unwrap());
        out.extend([qkv, o, saved.lse]);
    }
    out
}

/// The kernels that work element by element or row by row, on bf16; outputs widened.
fn run_bf16() -> Vec<Tensor> {
    let narrow = |shape: &[usize], seed| to_bf16(&random(shape, seed)).unwrap();
    let (x, residual) = (random(&[70, 77], 1), random(&[70, 77], 2));
    let (out, dy, w, b) = (narrow(&[70, 77], 3), narrow(&[70, 77], 4), narrow(&[77], 5), narrow(&[77], 6));
    let (dw, db) = (zeros(&[77]), zeros(&[77]));
    let (h, y, stats) = add_rms_norm(&x, &out, &w, 1e-5).unwrap();
    let dx = rms_norm_backward_add(&dy, &h, &w, &stats, &residual, &dw).unwrap();
    let (layer_h, layer_y, stats) = add_layer_norm(&x, &out, &w, &b, 1e-5).unwrap();
    let layer_dx = layer_norm_backward_add(&dy, &layer_h, &w, &stats, &residual, &dw, &db).unwrap();
    let mut outputs = vec![h, y, dx, layer_h, layer_y, layer_dx];
    let (y, stats) = rms_norm(&out, &w, 1e-5).unwrap();
    outputs.extend([y, rms_norm_backward(&dy, &out, &w, &stats, &dw).unwrap()]);
    let (y, stats) = layer_norm(&out, &w, &b, 1e-5).unwrap();
    outputs.extend([y, layer_norm_backward(&dy, &out, &w, &stats, &dw, &db).unwrap(), dw, db]);
    let gate_up = to_bf16(&(random(&[70, 2 * 77], 7) * 4.0).unwrap()).unwrap();
    for act in [Activation::Silu, Activation::GeluTanh, Activation::GeluErf, Activation::Relu] {
        outputs.extend([gated(&gate_up, act).unwrap(), gated_backward(&dy, &gate_up, act).unwrap()]);
        let (dx, y) = gated_backward_again(&dy, &gate_up, act).unwrap();
        outputs.extend([dx, y]);
        outputs.extend([activation(&out, act).unwrap(), activation_backward(&dy, &out, act).unwrap()]);
    }
    let (qkv, table) = (narrow(&[70, 4 * 20], 8), RopeTable::new(20, 70, 1e4, None).unwrap());
    rope_qkv(&qkv, 2, 1, &table, &(0..70).collect::<Vec<_>>(), false).unwrap();
    let addresses: Vec<(u64, u32)> = (0..70).map(|t| (t, 1)).collect();
    outputs.extend([qkv, dropout(&out, 0.3, &Philox::new(1, Purpose::Dropout, 2), 3, &addresses).unwrap()]);
    outputs.iter().map(|t| to_f32(t).unwrap()).collect()
}

#[test]
fn instruction_sets_agree() {
    assert!(Isa::Portable.force());
    let (portable, portable_bf16) = (run(), run_bf16());
    let mut fused: Option<Vec<Vec<u32>>> = None;
    for isa in [Isa::Avx2, Isa::Avx512, Isa::Amx] {
        if !isa.force() {
            continue;
        }
        let got = run();
        for (i, (got, want)) in got.iter().zip(&portable).enumerate() {
            assert_close(&flat(got), &wide(&flat(want)), 2e-5, &format!("{isa:?} output {i}"));
        }
        let got_bf16 = run_bf16();
        for (i, (got, want)) in got_bf16.iter().zip(&portable_bf16).enumerate() {
            // A difference in f32 may turn one rounding over: a unit in the last place, at most 2^-7 of the value.
            let tolerance = 2e-5 + 1.0 / 128.0;
            assert_close(&flat(got), &wide(&flat(want)), tolerance, &format!("{isa:?} bf16 output {i}"));
        }
        let got: Vec<_> = got.iter().chain(&got_bf16).map(bits).collect();
        if let Some(before) = &fused {
            for (i, (got, before)) in got.iter().zip(before).enumerate() {
                assert!(got == before, "output {i} differs between AVX2 and {isa:?}");
            }
        }
        fused = Some(got);
    }
}
