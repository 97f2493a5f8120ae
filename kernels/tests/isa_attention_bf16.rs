//! Bf16 attention on every instruction set: all within the bounds of the twin, decoding with the bits of the forward,
//! AVX2 and AVX-512 with the same bits.
//!
//! One test in its own binary, because the choice of instruction set is process-wide.

mod common;
#[path = "common/attention_bf16.rs"]
mod twin;

use candle_core::DType;
use common::bits;
use tandem_kernels::Isa;
use tandem_kernels::attention::{AttentionSpec, KvCacheLayer, decode_attention};
use twin::{bf16, check, cuts, run, to_f32};

/// As in the programs: large blocks start at a cache line, so that tiles can load rows where they lie.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const LENGTHS: [usize; 4] = [133, 1, 70, 64];

fn specs() -> Vec<AttentionSpec> {
    [(2, 2, 64, None), (4, 2, 20, Some(40)), (3, 1, 80, None), (17, 1, 32, Some(64)), (1, 1, 128, None)]
        .map(|(heads, kv_heads, head_dim, window)| {
            let scale = 1.0 / (head_dim as f32).sqrt();
            AttentionSpec { heads, kv_heads, head_dim, causal: true, window, scale }
        })
        .to_vec()
}

/// Bits of output, log-sum-exp and gradient of every spec, after checking that decoding gives the output.
fn results(isa: Isa) -> Vec<Vec<u32>> {
    let mut results = Vec::new();
    for spec in specs() {
        check(&spec, &LENGTHS);
        check(&AttentionSpec { causal: false, window: None, ..spec }, &LENGTHS);
        let tokens = LENGTHS.iter().sum();
        let (qkv, d_o) = (bf16(&[tokens, spec.qkv_width()], 6), bf16(&[tokens, spec.output_width()], 7));
        let outputs = run(&qkv, &d_o, &cuts(&LENGTHS), &spec).map(|t| bits(&to_f32(&t)));
        let len = LENGTHS[0];
        let cache = KvCacheLayer::new(1, len, spec.kv_heads, spec.head_dim, DType::BF16).unwrap();
        let sequence = qkv.narrow(0, 0, len).unwrap().copy().unwrap();
        cache.append(&sequence, spec.heads, &(0..len).map(|t| (0, t)).collect::<Vec<_>>()).unwrap();
        let rows: Vec<_> = (0..len).map(|t| (0, t + 1)).collect();
        let decoded = bits(&to_f32(&decode_attention(&sequence, &cache, &rows, &spec).unwrap()));
        assert_eq!(decoded, outputs[0][..decoded.len()], "{isa:?} {spec:?}");
        results.extend(outputs);
    }
    results
}

#[test]
fn every_path_keeps_its_promises() {
    assert!(Isa::Portable.force());
    results(Isa::Portable);
    let mut registers: Option<Vec<Vec<u32>>> = None;
    for isa in [Isa::Avx2, Isa::Avx512] {
        if isa.force() {
            let got = results(isa);
            assert!(registers.as_ref().is_none_or(|before| *before == got), "{isa:?} differs from AVX2");
            registers = Some(got);
        }
    }
    if Isa::Amx.force() {
        // Rounded probabilities show: otherwise this was the path of the registers.
        assert_ne!(Some(results(Isa::Amx)), registers);
    }
}
