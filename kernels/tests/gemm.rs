//! The matrix products against an f64 twin, and their three promises: batch, thread and tiling invariance, bit for bit.

use candle_core::{Device, Tensor};
use tandem_kernels::Isa;
use tandem_kernels::gemm::{
    K_BLOCK, PackedMatrix, bias_grad, linear, linear_input_grad, linear_packed, linear_packed_f32, linear_weight_grad,
};

fn values(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        })
        .collect()
}

fn tensor(values: &[f32], shape: (usize, usize)) -> Tensor {
    Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
}

fn flat(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

/// Largest error relative to the sum of absolute terms, the natural scale of a dot product.
fn worst(got: &[f32], want: &[f64], scale: &[f64]) -> f64 {
    got.iter().zip(want).zip(scale).map(|((g, w), s)| (f64::from(*g) - w).abs() / s.max(1e-30)).fold(0.0, f64::max)
}

/// `a [m, k] · b` in f64, with the sum of absolute terms; `b(p, j)` reads B.
fn twin(
    m: usize,
    n: usize,
    k: usize,
    a: impl Fn(usize, usize) -> f32,
    b: impl Fn(usize, usize) -> f32,
) -> [Vec<f64>; 2] {
    let (mut c, mut s) = (vec![0.0; m * n], vec![0.0; m * n]);
    for i in 0..m {
        for j in 0..n {
            for p in 0..k {
                let term = f64::from(a(i, p)) * f64::from(b(p, j));
                c[i * n + j] += term;
                s[i * n + j] += term.abs();
            }
        }
    }
    [c, s]
}

const SHAPES: [(usize, usize, usize); 10] = [
    (1, 1, 1),
    (1, 33, 257),
    (2, 16, 16),
    (7, 65, 300),
    (12, 32, 256),
    (13, 31, 511),
    (50, 100, 70),
    (64, 513, 129),
    (129, 47, 600),
    (500, 96, 33),
];

#[test]
fn products_match_their_f64_twins() {
    for (t, n, k) in SHAPES {
        let (x, w, dy) = (values(t * k, 1), values(n * k, 2), values(t * n, 3));
        let bias = values(n, 4);
        let (xt, wt, dyt) = (tensor(&x, (t, k)), tensor(&w, (n, k)), tensor(&dy, (t, n)));
        let bt = Tensor::from_slice(&bias, n, &Device::Cpu).unwrap();

        let [mut y, s] = twin(t, n, k, |i, p| x[i * k + p], |p, j| w[j * k + p]);
        assert!(worst(&flat(&linear(&xt, &wt, None).unwrap()), &y, &s) < 5e-7, "y {t} {n} {k}");
        y.iter_mut().enumerate().for_each(|(i, y)| *y += f64::from(bias[i % n]));
        let scale: Vec<f64> = s.iter().map(|s| s + 1.0).collect();
        assert!(worst(&flat(&linear(&xt, &wt, Some(&bt)).unwrap()), &y, &scale) < 5e-7, "y+b {t} {n} {k}");

        let [dx, s] = twin(t, k, n, |i, p| dy[i * n + p], |p, j| w[p * k + j]);
        assert!(worst(&flat(&linear_input_grad(&dyt, &wt).unwrap()), &dx, &s) < 5e-7, "dx {t} {n} {k}");

        let start = values(n * k, 5);
        let dw = tensor(&start, (n, k));
        linear_weight_grad(&dyt, &xt, &dw).unwrap();
        let [mut want, s] = twin(n, k, t, |i, p| dy[p * n + i], |p, j| x[p * k + j]);
        want.iter_mut().zip(&start).for_each(|(w, s)| *w += f64::from(*s));
        let scale: Vec<f64> = s.iter().map(|s| s + 1.0).collect();
        assert!(worst(&flat(&dw), &want, &scale) < 5e-7, "dw {t} {n} {k}");

        let db = Tensor::from_slice(&bias, n, &Device::Cpu).unwrap();
        bias_grad(&dyt, &db).unwrap();
        let want: Vec<f64> =
            (0..n).map(|j| f64::from(bias[j]) + (0..t).map(|i| f64::from(dy[i * n + j])).sum::<f64>()).collect();
        assert!(worst(&flat(&db), &want, &vec![t as f64; n]) < 5e-7, "db {t} {n} {k}");
    }
}

#[test]
fn a_row_does_not_depend_on_the_rows_beside_it() {
    // The last one is too large for its weight to be packed at once.
    for (t, n, k) in [(37, 65, 300), (500, 96, 576), (64, 1537, 257), (40, 1000, 1300)] {
        let (x, w) = (values(t * k, 1), values(n * k, 2));
        let w = tensor(&w, (n, k));
        let all = flat(&linear(&tensor(&x, (t, k)), &w, None).unwrap());
        for (first, rows) in [(0, 1), (t - 1, 1), (3, 2), (5, 13), (1, 30)] {
            let part = flat(&linear(&tensor(&x[first * k..(first + rows) * k], (rows, k)), &w, None).unwrap());
            let same = part.iter().zip(&all[first * n..]).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "rows {first}..{} of {t}×{k} by {n}", first + rows);
        }
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let (t, n, k) = (300, 200, 520);
    let (x, w, dy) =
        (tensor(&values(t * k, 1), (t, k)), tensor(&values(n * k, 2), (n, k)), tensor(&values(t * n, 3), (t, n)));
    let run = |threads: usize| {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
            let dw = Tensor::zeros((n, k), candle_core::DType::F32, &Device::Cpu).unwrap();
            linear_weight_grad(&dy, &x, &dw).unwrap();
            let y = flat(&linear(&x, &w, None).unwrap());
            let dx = flat(&linear_input_grad(&dy, &w).unwrap());
            [y, dx, flat(&dw)].concat().iter().map(|v| v.to_bits()).collect::<Vec<_>>()
        })
    };
    let one = run(1);
    assert_eq!(one, run(2));
    assert_eq!(one, run(5));
}

/// Several blocks of terms, the last one short, and several tasks of whole and of partial tiles: each element is what the
/// module defines, chain by chain.
#[test]
fn gradients_of_weights_are_sums_of_chains_of_blocks() {
    if Isa::active() == Isa::Portable {
        println!("skipped: without fused multiply-adds a product is rounded before it is added");
        return;
    }
    for (t, n, k) in [(530, 300, 450), (700, 41, 130), (513, 450, 33), (260, 64, 420)] {
        let (x, dy, start) = (values(t * k, 1), values(t * n, 2), values(n * k, 3));
        let (xt, dyt) = (tensor(&x, (t, k)), tensor(&dy, (t, n)));
        let chain = |i: usize, j: usize| {
            (0..t).step_by(K_BLOCK).fold(start[i * k + j], |sum, block| {
                let terms = block..t.min(block + K_BLOCK);
                sum + terms.fold(0f32, |sum, p| dy[p * n + i].mul_add(x[p * k + j], sum))
            })
        };
        // Not all of them: a multiply-add without an instruction for it takes long.
        let some: Vec<usize> = (0..n * k).filter(|at| at % 13 == 0 || at % k + 34 > k || at / k + 13 > n).collect();
        let want: Vec<u32> = some.iter().map(|at| chain(at / k, at % k).to_bits()).collect();
        for threads in [1, 2, 5] {
            let dw = tensor(&start, (n, k));
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| linear_weight_grad(&dyt, &xt, &dw)).unwrap();
            let got = flat(&dw);
            assert!(some.iter().zip(&want).all(|(at, want)| got[*at].to_bits() == *want), "{t} {n} {k}, {threads}");
        }
    }
}

#[test]
fn gradients_land_inside_a_flat_buffer_and_nowhere_else() {
    let (t, n, k) = (9, 5, 7);
    let buffer = Tensor::ones(3 + n * k + 4, candle_core::DType::F32, &Device::Cpu).unwrap();
    let dw = buffer.narrow(0, 3, n * k).unwrap().reshape((n, k)).unwrap();
    linear_weight_grad(&tensor(&values(t * n, 1), (t, n)), &tensor(&values(t * k, 2), (t, k)), &dw).unwrap();
    let all = flat(&buffer);
    assert!(all[..3].iter().chain(&all[3 + n * k..]).all(|v| *v == 1.0));
    assert!(all[3..3 + n * k].iter().all(|v| *v != 1.0));
}

#[test]
fn shapes_that_do_not_fit_are_refused_by_name() {
    let error = linear(&tensor(&values(6, 1), (2, 3)), &tensor(&values(8, 2), (2, 4)), None).unwrap_err().to_string();
    assert!(error.contains("linear") && error.contains("[3]") && error.contains("[4]"), "{error}");
    let half = tensor(&values(6, 1), (2, 3)).to_dtype(candle_core::DType::F16).unwrap();
    assert!(linear(&half, &tensor(&values(6, 2), (2, 3)), None).unwrap_err().to_string().contains("F16"));
}

#[test]
fn a_packed_weight_gives_the_same_bits() {
    for (t, n, k) in
        [(37, 65, 300), (500, 96, 576), (16, 1537, 257), (25, 70, 1300), (32, 33, 64), (1, 31, 1), (2, 3, 0)]
    {
        let (x, w) = (tensor(&values(t * k, 1), (t, k)), tensor(&values(n * k, 2), (n, k)));
        let bias = Tensor::from_vec(values(n, 3), n, &Device::Cpu).unwrap();
        let packed = PackedMatrix::new(&w).unwrap();
        assert_eq!(packed.dims(), [n, k]);
        assert!(packed.size_bytes() >= 4 * n * k && packed.size_bytes() <= 4 * (n + 31) * k);
        let bits = |t: &Tensor| flat(t).iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert!(bits(&packed.unpacked().unwrap()) == bits(&w), "{n} × {k} unpacked");
        for bias in [None, Some(&bias)] {
            let want = bits(&linear(&x, &w, bias).unwrap());
            assert!(bits(&linear_packed(&x, &packed, bias).unwrap()) == want, "{t}×{k} by {n}");
            assert!(bits(&linear_packed_f32(&x, &packed, bias).unwrap()) == want, "{t}×{k} by {n}");
        }
        let (short, narrow) = (bias.narrow(0, 1, n - 1).unwrap(), tensor(&values(t * (k + 1), 4), (t, k + 1)));
        assert!(linear_packed(&x, &packed, Some(&short)).is_err() && linear_packed(&narrow, &packed, None).is_err());
    }
}
