//! Matrix products against the `gemm` crate (what candle computes with), on the shapes of the example models.

use std::hint::black_box;

use candle_core::{Device, Tensor};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tandem_kernels::gemm::{linear, linear_input_grad, linear_weight_grad};

/// (name, rows, outputs, inputs): training steps of the `small` and `smollm` shapes, and decode steps of 16 and 1 rows.
const SHAPES: [(&str, usize, usize, usize); 6] = [
    ("small qkv", 4096, 768, 256),
    ("small down", 4096, 256, 688),
    ("smollm up", 2048, 1536, 576),
    ("square", 1024, 1024, 1024),
    ("decode 16", 16, 1536, 576),
    ("decode 1", 1, 1536, 576),
];

fn products(c: &mut Criterion) {
    for (name, t, n, k) in SHAPES {
        let random = |r: usize, c: usize| Tensor::rand(-1f32, 1., (r, c), &Device::Cpu).unwrap();
        let (x, w, dy, dw) = (random(t, k), random(n, k), random(t, n), random(n, k));
        let mut group = c.benchmark_group(name);
        group.sample_size(20).throughput(Throughput::Elements(2 * (t * n * k) as u64));
        group.bench_function("linear", |b| b.iter(|| linear(black_box(&x), &w, None).unwrap()));
        group.bench_function("input_grad", |b| b.iter(|| linear_input_grad(black_box(&dy), &w).unwrap()));
        group.bench_function("weight_grad", |b| b.iter(|| linear_weight_grad(black_box(&dy), &x, &dw).unwrap()));
        group.bench_function("gemm crate", |b| b.iter(|| black_box(&x).matmul(&w.t().unwrap()).unwrap()));
        group.finish();
    }
}

criterion_group!(benches, products);
criterion_main!(benches);
