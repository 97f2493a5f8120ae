//! The bf16 products on every path: each against an f64 twin within the bound of its sums, and each with the bits of
//! itself for any number of rows and threads, packed before or not.
//!
//! One test in its own binary, because the choice of path is process-wide.

mod common;

use candle_core::{DType, Device, Tensor};
use common::{bits, flat, random, values, with_threads};
use tandem_kernels::Isa;
use tandem_kernels::gemm::{
    Bf16Path, K_BLOCK_BF16, PackedMatrix, bias_grad, linear, linear_f32, linear_input_grad, linear_input_grad_f32,
    linear_packed, linear_packed_f32, linear_weight_grad,
};

/// As in the programs: large blocks start at a cache line, so that tiles can load rows where they lie.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Rounding of f32.
const UNIT: f64 = 1.0 / (1u64 << 24) as f64;
/// Rounding of bf16: its significand has 8 bits.
const HALF_UNIT: f64 = 1.0 / (1u64 << 8) as f64;

fn half(shape: &[usize], seed: u64) -> Tensor {
    random(shape, seed).to_dtype(DType::BF16).unwrap()
}

fn wide(t: &Tensor) -> Vec<f32> {
    flat(&t.to_dtype(DType::F32).unwrap())
}

fn half_bits(t: &Tensor) -> Vec<u32> {
    bits(&t.to_dtype(DType::F32).unwrap())
}

/// `a [m, k] · b` in f64 from the rounded inputs, and the sum of absolute terms.
fn twin(
    m: usize,
    n: usize,
    k: usize,
    a: impl Fn(usize, usize) -> f32,
    b: impl Fn(usize, usize) -> f32,
) -> [Vec<f64>; 2] {
    let (mut sums, mut scale) = (vec![0.0; m * n], vec![0.0; m * n]);
    for i in 0..m {
        for p in 0..k {
            let left = f64::from(a(i, p));
            for j in 0..n {
                let term = left * f64::from(b(p, j));
                sums[i * n + j] += term;
                scale[i * n + j] += term.abs();
            }
        }
    }
    [sums, scale]
}

/// The products of terms are exact. A sum rounds once for each term of a block and once for each block, whatever the
/// order within the block: `(min(k, 1024) + k / 1024 + 1) u Σ|ab|` bounds the error of every path. A bf16 result is
/// rounded once more.
fn check(got: &Tensor, k: usize, [want, scale]: &[Vec<f64>; 2], what: &str) {
    let terms = (k.min(K_BLOCK_BF16) + k / K_BLOCK_BF16 + 2) as f64;
    let rounding = if got.dtype() == DType::BF16 { HALF_UNIT } else { 0.0 };
    for (i, (got, (want, scale))) in wide(got).iter().zip(want.iter().zip(scale)).enumerate() {
        let bound = terms * UNIT * scale * (1.0 + HALF_UNIT) + rounding * want.abs();
        let error = (f64::from(*got) - want).abs();
        assert!(error <= bound, "{what}[{i}]: got {got}, want {want} (error {error:.2e}, bound {bound:.2e})");
    }
}

/// All products of one shape.
fn products(t: usize, n: usize, k: usize) {
    let name = format!("{:?} {:?} {t}×{n}×{k}", Bf16Path::active(), Isa::active());
    let (x, w, dy) = (half(&[t, k], 1), half(&[n, k], 2), half(&[t, n], 3));
    let (xv, wv, dyv) = (wide(&x), wide(&w), wide(&dy));
    let [y, scale] = twin(t, n, k, |i, p| xv[i * k + p], |p, j| wv[j * k + p]);
    let plain = [y.clone(), scale.clone()];
    check(&linear(&x, &w, None).unwrap(), k, &plain, &format!("y {name}"));
    check(&linear_f32(&x, &w, None).unwrap(), k, &plain, &format!("y f32 {name}"));
    for bias in [random(&[n], 4), half(&[n], 4)] {
        let b = wide(&bias);
        let with_bias = |v: &[f64], abs: bool| -> Vec<f64> {
            let term = |j: usize| if abs { f64::from(b[j]).abs() } else { f64::from(b[j]) };
            v.iter().enumerate().map(|(i, v)| v + term(i % n)).collect()
        };
        let want = [with_bias(&y, false), with_bias(&scale, true)];
        check(&linear(&x, &w, Some(&bias)).unwrap(), k, &want, &format!("y + b {name}"));
        check(&linear_f32(&x, &w, Some(&bias)).unwrap(), k, &want, &format!("y + b f32 {name}"));
    }
    let want = twin(t, k, n, |i, p| dyv[i * n + p], |p, j| wv[p * k + j]);
    check(&linear_input_grad(&dy, &w).unwrap(), n, &want, &format!("dx {name}"));
    check(&linear_input_grad_f32(&dy, &w).unwrap(), n, &want, &format!("dx f32 {name}"));

    let dw = random(&[n, k], 5);
    let [mut want, mut scale] = twin(n, k, t, |i, p| dyv[p * n + i], |p, j| xv[p * k + j]);
    for (i, start) in flat(&dw).iter().enumerate() {
        want[i] += f64::from(*start);
        scale[i] += f64::from(start.abs());
    }
    linear_weight_grad(&dy, &x, &dw).unwrap();
    check(&dw, t, &[want, scale], &format!("dw {name}"));

    let db = random(&[n], 6);
    let column = |j: usize, f: fn(f64) -> f64| (0..t).map(|i| f(f64::from(dyv[i * n + j]))).sum::<f64>();
    let start = flat(&db);
    let want = (0..n).map(|j| f64::from(start[j]) + column(j, |v| v)).collect();
    let scale = (0..n).map(|j| f64::from(start[j].abs()) + column(j, f64::abs)).collect();
    bias_grad(&dy, &db).unwrap();
    check(&db, t, &[want, scale], &format!("db {name}"));
}

/// Few rows out of many, packed or not, have the bits of the whole.
fn rows_are_independent(t: usize, n: usize, k: usize) {
    let (x, w, bias) = (half(&[t, k], 7), half(&[n, k], 8), half(&[n], 9));
    let packed = PackedMatrix::new(&w).unwrap();
    assert_eq!((packed.dims(), packed.dtype()), ([n, k], DType::BF16));
    assert!(packed.size_bytes() >= 2 * n * k && packed.size_bytes() <= 2 * (n + 31) * (k + 31));
    assert!(half_bits(&packed.unpacked().unwrap()) == half_bits(&w), "{n} × {k} unpacked");
    for bias in [None, Some(&bias)] {
        let (all, all_f32) = (linear(&x, &w, bias).unwrap(), linear_f32(&x, &w, bias).unwrap());
        for (first, rows) in [(0, t), (0, 1), (t - 1, 1), (3, 2), (5, 13), (1, 30), (2, 66.min(t - 2))] {
            let part = x.narrow(0, first, rows).unwrap().copy().unwrap();
            let what = format!("{:?} rows {first}..{} of {t}×{n}×{k}", Bf16Path::active(), first + rows);
            let want = half_bits(&all.narrow(0, first, rows).unwrap());
            assert!(half_bits(&linear(&part, &w, bias).unwrap()) == want, "{what}");
            assert!(half_bits(&linear_packed(&part, &packed, bias).unwrap()) == want, "{what} packed");
            let want = bits(&all_f32.narrow(0, first, rows).unwrap());
            assert!(bits(&linear_f32(&part, &w, bias).unwrap()) == want, "{what} f32");
            assert!(bits(&linear_packed_f32(&part, &packed, bias).unwrap()) == want, "{what} f32 packed");
        }
    }
    // The rows of dx likewise.
    let dy = half(&[t, n], 10);
    let all = half_bits(&linear_input_grad(&dy, &w).unwrap());
    let last = linear_input_grad(&dy.narrow(0, t - 1, 1).unwrap().copy().unwrap(), &w).unwrap();
    assert!(half_bits(&last) == all[(t - 1) * k..], "dx row");
}

/// Where a matrix starts in memory decides how tiles load it, not what comes out.
fn place_in_memory_does_not_matter() {
    let (t, n, k) = (210, 70, 1088);
    let (x, w, dy) = (half(&[t, k], 11), half(&[n, k], 12), half(&[t, n], 13));
    let moved = |x: &Tensor| {
        let padded = Tensor::cat(&[&half(&[1], 14), &x.flatten_all().unwrap()], 0).unwrap();
        padded.narrow(0, 1, x.elem_count()).unwrap().reshape(x.dims()).unwrap()
    };
    assert!(half_bits(&linear(&x, &w, None).unwrap()) == half_bits(&linear(&moved(&x), &moved(&w), None).unwrap()));
    let input_grad = |dy: &Tensor, w: &Tensor| half_bits(&linear_input_grad(dy, w).unwrap());
    assert!(input_grad(&dy, &w) == input_grad(&moved(&dy), &moved(&w)));
    let weight_grad = |dy: &Tensor, x: &Tensor| {
        let dw = random(&[n, k], 15);
        linear_weight_grad(dy, x, &dw).unwrap();
        bits(&dw)
    };
    assert!(weight_grad(&dy, &x) == weight_grad(&moved(&dy), &moved(&x)));
}

fn threads_do_not_matter() {
    let (t, n, k) = (2300, 200, 520);
    let run = || {
        let (x, w, dy) = (half(&[t, k], 1), half(&[n, k], 2), half(&[t, n], 3));
        let (dw, db) = (random(&[n, k], 4), random(&[n], 5));
        linear_weight_grad(&dy, &x, &dw).unwrap();
        bias_grad(&dy, &db).unwrap();
        let few = linear(&x.narrow(0, 0, 40).unwrap().copy().unwrap(), &w, None).unwrap();
        let outputs = [linear(&x, &w, None).unwrap(), few, linear_input_grad(&dy, &w).unwrap(), dw, db];
        outputs.map(|t| half_bits(&t))
    };
    let one = with_threads(1, run);
    assert!(one == with_threads(2, run) && one == with_threads(5, run), "{:?}", Bf16Path::active());
}

/// A NaN or an infinity reaches every element that it is a term of, and no other.
fn non_finite_values_propagate() {
    let (t, n, k) = (35, 40, 70);
    for bad in [f32::NAN, f32::INFINITY] {
        let mut x = values(t * k, 1);
        x[33 * k + 69] = bad;
        let x = Tensor::from_vec(x, (t, k), &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap();
        let w = half(&[n, k], 2);
        for y in [linear(&x, &w, None).unwrap(), linear_f32(&x, &w, None).unwrap()] {
            for (i, y) in wide(&y).iter().enumerate() {
                let expected = if i / n != 33 { y.is_finite() } else { !y.is_finite() && y.is_nan() == bad.is_nan() };
                assert!(expected, "{:?} {bad} row {} column {}: {y}", Bf16Path::active(), i / n, i % n);
            }
        }
    }
}

fn nothing_to_sum() {
    let empty = |shape: (usize, usize)| Tensor::zeros(shape, DType::BF16, &Device::Cpu).unwrap();
    let bias = half(&[3], 1);
    assert_eq!(wide(&linear(&empty((2, 0)), &empty((3, 0)), Some(&bias)).unwrap()), wide(&bias).repeat(2));
    assert_eq!(linear(&empty((0, 5)), &empty((3, 5)), None).unwrap().dims(), [0, 3]);
    assert_eq!(
        linear_packed(&empty((2, 5)), &PackedMatrix::new(&empty((0, 5))).unwrap(), None).unwrap().dims(),
        [2, 0]
    );
    let dw = random(&[3, 5], 2);
    let before = flat(&dw);
    linear_weight_grad(&empty((0, 3)), &empty((0, 5)), &dw).unwrap();
    assert_eq!(flat(&dw), before);
}

fn all() {
    for size in 1..=70 {
        products(size, 71 - size, 1 + (size * 37) % 70);
        products(3, size, 33);
    }
    for (t, n, k) in [(1, 64, 1100), (200, 33, 2100), (130, 65, 1024), (4500, 17, 9), (70, 9, 4200)] {
        products(t, n, k);
    }
    for (t, n, k) in [(37, 65, 300), (500, 96, 576), (100, 70, 2057), (64, 1537, 257)] {
        rows_are_independent(t, n, k);
    }
    place_in_memory_does_not_matter();
    threads_do_not_matter();
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
