//! Rotary embedding against its twin, its inverse, and the published long-context scalings.

mod common;

use common::{assert_close, bits, flat, random, rows, wide, with_threads};
use tandem_kernels::rope::{RopeScaling, RopeTable, rope, rope_qkv};
use tandem_kernels::slice::{to_bf16, to_f32};
use tandem_kernels::{Error, reference};

const THETA: f64 = 10_000.0;

#[test]
fn matches_the_twin() {
    for (head_dim, rotary_dim) in [(2, 2), (6, 6), (20, 20), (64, 64), (64, 16)] {
        let (heads, positions) = (3, [0, 1, 2, 63, 100, 7]);
        let table = RopeTable::new(rotary_dim, 128, THETA, None).unwrap();
        let x = random(&[positions.len(), heads, head_dim], 1);
        let before = rows(&x.reshape((positions.len() * heads, head_dim)).unwrap());
        rope(&x, &table, &positions, false).unwrap();
        let after = rows(&x.reshape((positions.len() * heads, head_dim)).unwrap());
        for (i, (before, after)) in before.iter().zip(&after).enumerate() {
            let want = reference::rope::rope(&wide(before), rotary_dim, THETA, positions[i / heads] as f64);
            assert_close(after, &want, 3e-7, &format!("D={head_dim} head {i}"));
        }
    }
}

#[test]
fn inverse_is_the_transpose() {
    // A rotation's backward is its inverse: <R x, y> = <x, R⁻¹ y>.
    let positions = [5, 90, 31];
    let table = RopeTable::new(32, 128, THETA, None).unwrap();
    let (x, y) = (random(&[3, 2, 32], 1), random(&[3, 2, 32], 2));
    let (x0, y0) = (flat(&x), flat(&y));
    rope(&x, &table, &positions, false).unwrap();
    rope(&y, &table, &positions, true).unwrap();
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| *a as f64 * *b as f64).sum::<f64>();
    assert!((dot(&flat(&x), &y0) - dot(&x0, &flat(&y))).abs() < 1e-5);
    rope(&x, &table, &positions, true).unwrap();
    assert_close(&flat(&x), &wide(&x0), 3e-7, "there and back");
}

#[test]
fn fused_projection_rotates_queries_and_keys_only() {
    let (heads, kv_heads, head_dim) = (4, 2, 16);
    let positions: Vec<u32> = (0..70).collect();
    let table = RopeTable::new(head_dim, 70, THETA, None).unwrap();
    let qkv = random(&[70, 8 * head_dim], 3);
    let before = qkv.copy().unwrap();
    let separate = qkv.reshape((70, 8, head_dim)).unwrap().narrow(1, 0, 6).unwrap().contiguous().unwrap();
    with_threads(3, || rope_qkv(&qkv, heads, kv_heads, &table, &positions, false)).unwrap();
    rope(&separate, &table, &positions, false).unwrap();
    let after = qkv.reshape((70, 8, head_dim)).unwrap();
    assert_eq!(bits(&after.narrow(1, 0, 6).unwrap()), bits(&separate));
    let values = |t: &candle_core::Tensor| bits(&t.reshape((70, 8, head_dim)).unwrap().narrow(1, 6, 2).unwrap());
    assert_eq!(values(&qkv), values(&before));
}

/// Rotating (1, 0) shows the cosines: recovers the frequency of coordinate `i` at position 1.
fn frequencies(dim: usize, theta: f64, scaling: RopeScaling) -> Vec<f64> {
    let table = RopeTable::new(dim, 2, theta, Some(scaling)).unwrap();
    let mut x = vec![0.0; dim];
    x[..dim / 2].fill(1.0);
    let x = common::tensor(&x, &[1, 1, dim]);
    rope(&x, &table, &[1], false).unwrap();
    let x = flat(&x);
    (0..dim / 2).map(|i| (x[dim / 2 + i] as f64).atan2(x[i] as f64)).collect()
}

#[test]
fn scalings_match_their_definitions() {
    let linear = frequencies(8, THETA, RopeScaling::Linear { factor: 4.0 });
    for (i, got) in linear.iter().enumerate() {
        assert!((got - THETA.powf(-(i as f64) / 4.0) / 4.0).abs() < 1e-6);
    }
    // Llama 3.1: head width 128, theta 500000, factor 8, low 1, high 4, original context 8192.
    let llama = frequencies(
        128,
        500_000.0,
        RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_positions: 8192 },
    );
    for (i, got) in llama.iter().enumerate() {
        let frequency = 500_000f64.powf(-(i as f64) / 64.0);
        let wavelength = std::f64::consts::TAU / frequency;
        let want = if wavelength < 8192.0 / 4.0 {
            frequency
        } else if wavelength > 8192.0 {
            frequency / 8.0
        } else {
            let smooth = (8192.0 / wavelength - 1.0) / 3.0;
            (1.0 - smooth) * frequency / 8.0 + smooth * frequency
        };
        assert!((got - want).abs() < 1e-7 * (1.0 + want), "frequency {i}: got {got}, want {want}");
    }
}

#[test]
fn misfits_are_errors() {
    assert!(RopeTable::new(7, 10, THETA, None).is_err());
    assert!(RopeTable::new(8, 10, f64::NAN, None).is_err());
    let table = RopeTable::new(8, 10, THETA, None).unwrap();
    let x = random(&[2, 1, 8], 1);
    assert!(matches!(rope(&x, &table, &[0, 10], false), Err(Error::Index { index: 10, limit: 10, .. })));
    assert!(rope(&x, &table, &[0], false).is_err());
    assert!(rope(&random(&[2, 1, 4], 1), &table, &[0, 1], false).is_err());
    assert!(rope_qkv(&random(&[2, 25], 1), 1, 1, &table, &[0, 1], false).is_err());
}

#[test]
fn bf16_is_f32_rounded_once_and_near_the_twin() {
    for (heads, kv_heads, head_dim, rotary_dim) in [(3, 1, 20, 20), (2, 2, 64, 64), (4, 2, 64, 16)] {
        let all = heads + 2 * kv_heads;
        let positions: Vec<u32> = (0..70).map(|t| t * 7 % 100).collect();
        let table = RopeTable::new(rotary_dim, 100, THETA, None).unwrap();
        for inverse in [false, true] {
            let x = to_bf16(&random(&[70, all * head_dim], 3)).unwrap();
            let before = to_f32(&x).unwrap();
            let (exact, alone) = (before.copy().unwrap(), x.narrow(0, 33, 1).unwrap().copy().unwrap());
            rope_qkv(&x, heads, kv_heads, &table, &positions, inverse).unwrap();
            rope_qkv(&exact, heads, kv_heads, &table, &positions, inverse).unwrap();
            rope_qkv(&alone, heads, kv_heads, &table, &positions[33..34], inverse).unwrap();
            let after = to_f32(&x).unwrap();
            assert_eq!(bits(&after), bits(&to_f32(&to_bf16(&exact).unwrap()).unwrap()));
            assert_eq!(bits(&to_f32(&alone).unwrap()), bits(&after.narrow(0, 33, 1).unwrap()));
            let heads_of = |t: &candle_core::Tensor| rows(&t.reshape((70 * all, head_dim)).unwrap());
            for (i, (before, after)) in heads_of(&before).iter().zip(heads_of(&after)).enumerate() {
                let angle = if i % all < heads + kv_heads { positions[i / all] as f64 } else { 0.0 };
                let angle = if inverse { -angle } else { angle };
                let want = reference::rope::rope(&wide(before), rotary_dim, THETA, angle);
                for (after, want) in after.iter().zip(want) {
                    // The bound of f32 and one rounding, of at most 2^-8 of the result.
                    assert!((*after as f64 - want).abs() <= 1e-6 + (want.abs() + 1e-6) / 256.0, "{after} {want}");
                }
            }
        }
    }
}
