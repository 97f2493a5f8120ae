//! Products with weights of 8 bits on every path: against the f64 twins within their bounds, and with the bits of themselves
//! for any number of rows and threads.
//!
//! One test in its own binary, because the choice of path is process-wide.

mod common;

use candle_core::{DType, Device, Tensor};
use common::{bits, flat, random, tensor, values, wide, with_threads};
use tandem_kernels::gemm::{Bf16Path, K_BLOCK_BF16, PackedMatrix, linear_packed, linear_packed_f32, row_maxima};
use tandem_kernels::reference::gemm::{int8, linear};
use tandem_kernels::{Error, Isa};

/// As in the programs: large blocks start at a cache line, so that tiles can load rows where they lie.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Rounding of f32.
const UNIT: f64 = 1.0 / (1u64 << 24) as f64;
/// Rounding of bf16: its significand has 8 bits.
const HALF_UNIT: f64 = 1.0 / (1u64 << 8) as f64;

/// What a multiple of a scale may be off by, in scales, where scale and quotient are formed in f32.
const SCALE: f64 = 127.0 * (1.0 / (1u64 << 16) as f64 + UNIT);

fn half(shape: &[usize], seed: u64) -> Tensor {
    random(shape, seed).to_dtype(DType::BF16).unwrap()
}

fn widened(t: &Tensor) -> Tensor {
    t.to_dtype(DType::F32).unwrap()
}

fn quantised(w: &Tensor) -> PackedMatrix {
    PackedMatrix::int8(w, &row_maxima(w).unwrap()).unwrap()
}

/// Rows of weights of very different sizes, one of zeros, one of numbers too small for a scale.
fn weight(n: usize, k: usize, seed: u64) -> Tensor {
    let mut w = values(n * k, seed);
    for (row, w) in w.chunks_mut(k).enumerate() {
        let size = match row % 7 {
            5 => 0.0,
            6 => f32::MIN_POSITIVE,
            size => 10f32.powi(3 * size as i32 - 6),
        };
        w.iter_mut().for_each(|value| *value *= size);
    }
    tensor(&w, &[n, k])
}

/// A weight is off by half of its scale at most; in f32 its quotient is rounded once more, by `127 u`. The scale of f32 may
/// be the next one of 17 bits where the quotient that it is rounded up from is rounded itself.
fn weights_are_the_nearest_multiples(n: usize, k: usize) {
    let w = weight(n, k, 1);
    let packed = quantised(&w);
    assert_eq!((packed.dims(), packed.dtype()), ([n, k], DType::BF16));
    let filled = |size: usize| size.next_multiple_of(32);
    assert_eq!(packed.size_bytes(), filled(n) * (filled(k) + 4), "integers and scales, nothing else");
    assert_eq!(packed.size_bytes(), PackedMatrix::int8_bytes(n, k));
    let (scales, twin) = int8(&wide(&flat(&w)), k);
    let again = quantised(&packed.dequantised().unwrap().unwrap());
    let dequantised = |packed: &PackedMatrix| bits(&packed.dequantised().unwrap().unwrap());
    assert!(dequantised(&again) == dequantised(&packed), "a second time changes nothing");
    let found = flat(&packed.dequantised().unwrap().unwrap());
    for (index, (found, (w, twin))) in found.iter().zip(flat(&w).iter().zip(twin)).enumerate() {
        let (found, w, scale) = (f64::from(*found), f64::from(*w), scales[index / k]);
        if scale < f64::from(f32::MIN_POSITIVE) {
            assert!(found == 0.0, "row {} has no scale: {found}", index / k);
            continue;
        }
        let most = scale * (0.5 + SCALE);
        assert!((found - w).abs() <= most, "{w} became {found}, more than {most} away");
        // Only what lies between two multiples may have become the other one.
        let is_other = (found - twin).abs() > scale * 2.0 * SCALE;
        assert!(!is_other || (found - w).abs() >= scale * (0.5 - 2.0 * SCALE), "{w}: {found}, not {twin}");
    }
}

/// The terms are exact, the sums as those of bf16 products (see `isa_gemm_bf16.rs`), then a product and a sum are rounded:
/// `(min(k, 1024) + k / 1024 + 4) u Σ|terms|`, and the rounding of a bf16 result. Against the original weights, beyond that,
/// half a scale for each `|x|`.
fn products(t: usize, n: usize, k: usize) {
    let name = format!("{:?} {:?} {t}×{n}×{k}", Bf16Path::active(), Isa::active());
    let (x, w) = (half(&[t, k], 3), weight(n, k, 4));
    let packed = quantised(&w);
    let (scales, _) = int8(&wide(&flat(&w)), k);
    let held = wide(&flat(&packed.dequantised().unwrap().unwrap()));
    let (x64, w64) = (wide(&flat(&widened(&x))), wide(&flat(&w)));
    for bias in [None, Some(random(&[n], 5)), Some(half(&[n], 5))] {
        let b64 = bias.as_ref().map(|bias| wide(&flat(&widened(bias))));
        let [of_held, size] = linear(&x64, &held, b64.as_deref(), k);
        let [of_original, _] = linear(&x64, &w64, b64.as_deref(), k);
        let results = [
            linear_packed(&x, &packed, bias.as_ref()).unwrap(),
            linear_packed_f32(&x, &packed, bias.as_ref()).unwrap(),
        ];
        for (y, rounding) in results.iter().zip([HALF_UNIT, 0.0]) {
            assert_eq!(y.dtype() == DType::F32, rounding == 0.0);
            for (i, found) in flat(&widened(y)).iter().enumerate() {
                let terms = (k.min(K_BLOCK_BF16) + k / K_BLOCK_BF16 + 4) as f64;
                let bound = terms * UNIT * size[i] * (1.0 + HALF_UNIT) + rounding * of_held[i].abs();
                let (found, row) = (f64::from(*found), i / n);
                let error = (found - of_held[i]).abs();
                assert!(error <= bound + 1e-40, "{name}[{i}]: {found}, not {} ({error:.2e} > {bound:.2e})", of_held[i]);
                let inputs: f64 = x64[row * k..(row + 1) * k].iter().map(|x| x.abs()).sum();
                let scale = scales[i % n].max(2.0 * f64::from(f32::MIN_POSITIVE));
                let bound = bound + scale * (0.5 + SCALE) * inputs;
                assert!((found - of_original[i]).abs() <= bound, "{name}[{i}]: {found}, not {}", of_original[i]);
            }
        }
    }
}

/// Few rows out of many have the bits of the whole, on few threads and on many.
fn rows_and_threads_are_independent(t: usize, n: usize, k: usize) {
    let (x, packed, bias) = (half(&[t, k], 7), quantised(&weight(n, k, 8)), half(&[n], 9));
    let run = |x: &Tensor, bias: Option<&Tensor>| {
        let y = linear_packed(x, &packed, bias).unwrap();
        [bits(&widened(&y)), bits(&linear_packed_f32(x, &packed, bias).unwrap())]
    };
    for bias in [None, Some(&bias)] {
        let all = run(&x, bias);
        for (first, rows) in [(0, 1), (t - 1, 1), (3, 2), (5, 13), (1, 30), (2, 35), (2, 66.min(t - 2))] {
            let found = run(&x.narrow(0, first, rows).unwrap().copy().unwrap(), bias);
            for (found, all) in found.iter().zip(&all) {
                let what = format!("{:?} rows {first}..{} of {t}×{n}×{k}", Bf16Path::active(), first + rows);
                assert!(*found == all[first * n..(first + rows) * n], "{what}");
            }
        }
        for threads in [1, 2, 5] {
            assert!(with_threads(threads, || run(&x, bias)) == all, "{threads} threads");
        }
    }
}

/// Part of a row under the scale of the whole row is part of the row.
fn slices_keep_the_scale_of_their_row() {
    let (n, k) = (45, 96);
    let w = weight(n, k, 10);
    let (maxima, whole) = (row_maxima(&w).unwrap(), quantised(&w).dequantised().unwrap().unwrap());
    for (first, len) in [(0, 40), (40, 56)] {
        let slice = w.narrow(1, first, len).unwrap().contiguous().unwrap();
        let part = PackedMatrix::int8(&slice, &maxima).unwrap().dequantised().unwrap().unwrap();
        assert_eq!(bits(&part), bits(&whole.narrow(1, first, len).unwrap().contiguous().unwrap()));
    }
}

fn what_is_no_number_is_refused() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut w = values(5 * 40, 1);
        w[3 * 40 + 17] = bad;
        let w = tensor(&w, &[5, 40]);
        let maxima = row_maxima(&w).unwrap();
        assert_eq!(maxima.iter().position(|maximum| !maximum.is_finite()), Some(3));
        assert_eq!(maxima[3].is_nan(), bad.is_nan());
        let error = PackedMatrix::int8(&w, &maxima).unwrap_err();
        assert!(matches!(error, Error::NonFinite { index: 3, .. }), "{error}");
    }
    assert!(PackedMatrix::int8(&random(&[2, 3], 1), &[1.0]).is_err(), "a maximum for each row");
    assert!(PackedMatrix::int8(&half(&[2, 3], 1), &[1.0, 1.0]).is_err(), "f32 only");
    let x = random(&[1, 3], 1);
    assert!(linear_packed(&x, &quantised(&random(&[2, 3], 1)), None).is_err(), "bf16 rows only");
}

/// What is not finite in a row of `x` reaches that row and no other.
fn non_finite_values_propagate() {
    let (t, n, k) = (35, 40, 70);
    for bad in [f32::NAN, f32::INFINITY] {
        let mut x = values(t * k, 1);
        x[33 * k + 69] = bad;
        let x = tensor(&x, &[t, k]).to_dtype(DType::BF16).unwrap();
        let y = linear_packed_f32(&x, &quantised(&random(&[n, k], 2)), None).unwrap();
        for (i, y) in flat(&y).iter().enumerate() {
            assert_eq!(y.is_finite(), i / n != 33, "{:?} {bad} {i}: {y}", Bf16Path::active());
        }
    }
}

fn nothing_to_sum() {
    let empty = |shape: (usize, usize), dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
    let (bias, none) = (half(&[3], 1), quantised(&empty((3, 0), DType::F32)));
    let y = linear_packed_f32(&empty((2, 0), DType::BF16), &none, Some(&bias)).unwrap();
    assert_eq!(flat(&y), flat(&widened(&bias)).repeat(2));
    assert_eq!(flat(&linear_packed_f32(&empty((2, 0), DType::BF16), &none, None).unwrap()), [0.0; 6]);
    let packed = quantised(&random(&[3, 5], 2));
    assert_eq!(linear_packed(&empty((0, 5), DType::BF16), &packed, None).unwrap().dims(), [0, 3]);
    let packed = quantised(&empty((0, 5), DType::F32));
    assert_eq!(linear_packed(&empty((2, 5), DType::BF16), &packed, None).unwrap().dims(), [2, 0]);
}

fn all() {
    for size in 1..=70 {
        products(size, 71 - size, 1 + (size * 37) % 70);
        products(3, size, 33);
    }
    for (t, n, k) in [(1, 64, 1100), (200, 33, 2100), (130, 65, 1024), (70, 9, 4200), (40, 70, 3100)] {
        products(t, n, k);
    }
    for (t, n, k) in [(37, 65, 300), (500, 96, 576), (100, 70, 2057), (64, 1537, 257)] {
        rows_and_threads_are_independent(t, n, k);
    }
    for (n, k) in [(1, 1), (33, 31), (70, 200)] {
        weights_are_the_nearest_multiples(n, k);
    }
    slices_keep_the_scale_of_their_row();
    what_is_no_number_is_refused();
    non_finite_values_propagate();
    nothing_to_sum();
}

#[test]
fn every_path_keeps_the_promises() {
    for path in [Bf16Path::Amx, Bf16Path::Dot, Bf16Path::Widen] {
        if path.force() {
            assert_eq!(Bf16Path::active(), path);
            all();
        }
    }
    // The path of processors without 512-bit registers, compiled for each instruction set.
    for isa in [Isa::Avx2, Isa::Portable] {
        if isa.force() {
            assert_eq!(Bf16Path::active(), Bf16Path::Widen);
            all();
        }
    }
}
