//! AVX2 and AVX-512 give the same bits; the portable path agrees within rounding.
//!
//! One test in its own binary, because the choice of instruction set is process-wide.

mod common;

use candle_core::Tensor;
use common::{assert_close, bits, flat, random, wide, zeros};
use tandem_kernels::Isa;
use tandem_kernels::attention::{AttentionSpec, KvCacheLayer, attention, attention_backward, decode_attention};
use tandem_kernels::mlp::{Activation, gated, gated_backward};
use tandem_kernels::norm::{layer_norm, layer_norm_backward, rms_norm, rms_norm_backward};
use tandem_kernels::rope::{RopeTable, rope_qkv};

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
    for (heads, kv_heads, head_dim, window) in [(2, 2, 64, None), (4, 2, 20, Some(40)), (3, 1, 80, None)] {
        let spec = AttentionSpec { heads, kv_heads, head_dim, causal: true, window, scale: 0.2 };
        let qkv = random(&[203, spec.qkv_width()], 6);
        let table = RopeTable::new(head_dim, 203, 1e4, None).unwrap();
        rope_qkv(&qkv, heads, kv_heads, &table, &(0..203).collect::<Vec<_>>(), false).unwrap();
        let (o, saved) = attention(&qkv, &[0, 133, 203], &spec).unwrap();
        let d_o = random(&[203, spec.output_width()], 7);
        out.push(attention_backward(&d_o, &qkv, &o, &saved, &[0, 133, 203], &spec).unwrap());
        let cache = KvCacheLayer::new(1, 203, kv_heads, head_dim).unwrap();
        cache.append(&qkv, heads, &(0..203).map(|t| (0, t)).collect::<Vec<_>>()).unwrap();
        let last = qkv.narrow(0, 202, 1).unwrap().copy().unwrap();
        out.push(decode_attention(&last, &cache, &[(0, 203)], &spec).unwrap());
        out.extend([qkv, o, saved.lse]);
    }
    out
}

#[test]
fn instruction_sets_agree() {
    assert!(Isa::Portable.force());
    let portable = run();
    let mut fused: Option<Vec<Vec<u32>>> = None;
    for isa in [Isa::Avx2, Isa::Avx512] {
        if !isa.force() {
            continue;
        }
        let got = run();
        for (i, (got, want)) in got.iter().zip(&portable).enumerate() {
            assert_close(&flat(got), &wide(&flat(want)), 2e-5, &format!("{isa:?} output {i}"));
        }
        let got: Vec<_> = got.iter().map(bits).collect();
        if let Some(before) = &fused {
            for (i, (got, before)) in got.iter().zip(before).enumerate() {
                assert!(got == before, "output {i} differs between AVX2 and {isa:?}");
            }
        }
        fused = Some(got);
    }
}
