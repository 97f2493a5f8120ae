//! Bf16 attention against its twin: values, gradients, batch and thread invariance.

mod common;
#[path = "common/attention_bf16.rs"]
mod twin;

use candle_core::{DType, Tensor};
use common::{bits, random, with_threads};
use tandem_kernels::attention::{AttentionSpec, attention, attention_backward};
use twin::{bf16, check, cuts, run, to_f32};

/// As in the programs: large blocks start at a cache line, so that tiles can load rows where they lie.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Lengths around the block size and the tile size, and short ones.
const LENGTHS: [usize; 9] = [1, 2, 63, 64, 65, 130, 7, 33, 200];

fn spec(heads: usize, kv_heads: usize, head_dim: usize, causal: bool, window: Option<usize>) -> AttentionSpec {
    AttentionSpec { heads, kv_heads, head_dim, causal, window, scale: 1.0 / (head_dim as f32).sqrt() }
}

/// Every mask and grouping, with head widths that are and are not whole tiles.
fn specs() -> Vec<AttentionSpec> {
    vec![
        spec(2, 2, 64, true, None),
        spec(4, 2, 20, true, None),
        spec(3, 1, 32, false, None),
        spec(2, 1, 64, true, Some(17)),
        spec(2, 2, 80, true, Some(64)),
        spec(1, 1, 128, true, Some(100)),
        spec(1, 1, 1, true, None),
        spec(5, 1, 8, true, Some(1)),
    ]
}

#[test]
fn matches_the_twin() {
    for spec in specs() {
        check(&spec, &LENGTHS);
    }
    // An empty sequence is a sequence.
    check(&spec(2, 1, 16, true, None), &[0, 5, 0, 66, 0]);
    // Several chunks of queries.
    check(&spec(2, 1, 32, true, None), &[700]);
    check(&spec(1, 1, 32, false, None), &[530]);
}

#[test]
fn sequences_do_not_depend_on_the_batch() {
    for spec in specs() {
        let cu = cuts(&LENGTHS);
        let tokens = LENGTHS.iter().sum::<usize>();
        let (qkv, d_o) = (bf16(&[tokens, spec.qkv_width()], 3), bf16(&[tokens, spec.output_width()], 4));
        let packed = run(&qkv, &d_o, &cu, &spec);
        for (n, len) in LENGTHS.into_iter().enumerate() {
            let part = |t: &Tensor| t.narrow(0, cu[n] as usize, len).unwrap().copy().unwrap();
            let alone = run(&part(&qkv), &part(&d_o), &[0, len as u32], &spec);
            for (alone, packed) in alone.iter().zip(&packed) {
                assert_eq!(bits(&to_f32(alone)), bits(&to_f32(&part(packed))), "{spec:?} sequence {n}");
            }
        }
    }
}

#[test]
fn a_prefix_does_not_depend_on_what_follows() {
    for spec in specs().into_iter().filter(|spec| spec.causal) {
        let qkv = bf16(&[150, spec.qkv_width()], 3);
        let (o, saved) = attention(&qkv, &[0, 150], &spec).unwrap();
        for len in [1, 2, 5, 31, 32, 63, 64, 66, 129] {
            let part = |t: &Tensor| t.narrow(0, 0, len).unwrap().copy().unwrap();
            let (short, short_saved) = attention(&part(&qkv), &[0, len as u32], &spec).unwrap();
            assert_eq!(bits(&to_f32(&short)), bits(&to_f32(&part(&o))), "{spec:?} length {len}");
            assert_eq!(bits(&short_saved.lse), bits(&part(&saved.lse)), "{spec:?} length {len}");
        }
    }
}

#[test]
fn threads_do_not_matter() {
    for spec in specs() {
        let cu = cuts(&LENGTHS);
        let tokens = LENGTHS.iter().sum::<usize>();
        let (qkv, d_o) = (bf16(&[tokens, spec.qkv_width()], 3), bf16(&[tokens, spec.output_width()], 4));
        let run = |threads| with_threads(threads, || run(&qkv, &d_o, &cu, &spec).map(|t| bits(&to_f32(&t))));
        assert_eq!(run(1), run(3), "{spec:?}");
    }
}

#[test]
fn large_scores_do_not_overflow() {
    // Scores of ±2000: only the running maximum keeps them in range.
    let spec = AttentionSpec { scale: 100.0, ..spec(1, 1, 16, true, None) };
    let qkv = bf16(&[100, 48], 5);
    let outputs = run(&qkv, &bf16(&[100, 16], 6), &[0, 100], &spec);
    assert!(outputs.iter().all(|t| common::flat(&to_f32(t)).iter().all(|v| v.is_finite())));
}

#[test]
fn dtypes_do_not_mix() {
    let spec = spec(2, 1, 16, true, None);
    let qkv = bf16(&[5, 64], 1);
    let (o, saved) = attention(&qkv, &[0, 5], &spec).unwrap();
    let d_o = random(&[5, 32], 2);
    assert!(attention_backward(&d_o, &qkv, &o, &saved, &[0, 5], &spec).is_err());
    assert!(attention(&qkv.to_dtype(DType::F16).unwrap(), &[0, 5], &spec).is_err());
}
