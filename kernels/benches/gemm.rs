//! Matrix products in f32 and bf16, on the shapes of the example models; f32 against the `gemm` crate (what candle
//! computes with).
//!
//! Run with the allocator of the programs: a fresh output costs a page fault for every 4 KiB, a reused one does not.

use std::hint::black_box;
use std::time::Duration;

use candle_core::{DType, Device, Tensor};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tandem_kernels::gemm::{
    PackedMatrix, linear, linear_f32, linear_input_grad, linear_packed_f32, linear_weight_grad, row_maxima,
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// (name, rows, outputs, inputs): training steps of the `small` and `smollm` shapes, and a tile of the head.
const TRAINING: [(&str, usize, usize, usize); 6] = [
    ("small qkv", 4096, 768, 256),
    ("small up", 4096, 688, 256),
    ("small down", 4096, 256, 688),
    ("smollm up", 2048, 1536, 576),
    ("head tile", 1024, 2048, 576),
    ("square", 1024, 1024, 1024),
];

/// (name, outputs, inputs): weights of one layer, and of a head that no cache holds.
const DECODING: [(&str, usize, usize); 2] = [("decode up", 1536, 576), ("decode head", 49152, 576)];

fn random(rows: usize, columns: usize, dtype: DType) -> Tensor {
    Tensor::rand(-1f32, 1., (rows, columns), &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

fn training(c: &mut Criterion) {
    for (name, t, n, k) in TRAINING {
        for dtype in [DType::F32, DType::BF16] {
            let (x, w, dy) = (random(t, k, dtype), random(n, k, dtype), random(t, n, dtype));
            let dw = random(n, k, DType::F32);
            let mut group = c.benchmark_group(format!("{name} {}", dtype.as_str()));
            group.sample_size(10).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(400));
            group.throughput(Throughput::Elements(2 * (t * n * k) as u64));
            group.bench_function("linear", |b| b.iter(|| linear(black_box(&x), &w, None).unwrap()));
            group.bench_function("input_grad", |b| b.iter(|| linear_input_grad(black_box(&dy), &w).unwrap()));
            group.bench_function("weight_grad", |b| b.iter(|| linear_weight_grad(black_box(&dy), &x, &dw).unwrap()));
            if dtype == DType::F32 {
                group.bench_function("gemm crate", |b| b.iter(|| black_box(&x).matmul(&w.t().unwrap()).unwrap()));
            } else {
                group.bench_function("linear_f32", |b| b.iter(|| linear_f32(black_box(&x), &w, None).unwrap()));
            }
            group.finish();
        }
    }
}

fn decoding(c: &mut Criterion) {
    for (name, n, k) in DECODING {
        for dtype in [DType::F32, DType::BF16] {
            let packed = PackedMatrix::new(&random(n, k, dtype)).unwrap();
            let mut group = c.benchmark_group(format!("{name} {}", dtype.as_str()));
            group.sample_size(10).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(400));
            group.throughput(Throughput::Bytes((n * k * dtype.size_in_bytes()) as u64));
            for rows in [1, 16, 64] {
                let x = random(rows, k, dtype);
                group.bench_function(format!("{rows} rows"), |b| {
                    b.iter(|| linear_packed_f32(black_box(&x), &packed, None).unwrap());
                });
            }
            group.finish();
        }
    }
}

/// (name, outputs, inputs): the maps of SmolLM2's blocks.
const BLOCK: [(usize, usize); 4] = [(960, 576), (576, 576), (3072, 576), (576, 1536)];
/// Blocks that are read one after the other, as many as no second-level cache holds.
const BLOCKS: usize = 30;

/// All linear maps of SmolLM2-135M's blocks one after the other, in bf16 and in 8 bits: what a step of decoding reads.
fn weights_only(c: &mut Criterion) {
    let weights = || (0..BLOCKS).flat_map(|_| BLOCK).map(|(n, k)| random(n, k, DType::F32));
    let bf16 = weights().map(|w| PackedMatrix::new(&w.to_dtype(DType::BF16).unwrap()).unwrap());
    let int8 = weights().map(|w| PackedMatrix::int8(&w, &row_maxima(&w).unwrap()).unwrap());
    let formats: [(&str, Vec<PackedMatrix>); 2] = [("bf16", bf16.collect()), ("int8", int8.collect())];
    let mut group = c.benchmark_group("decode blocks");
    group.sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_millis(700));
    for rows in [1, 8, 16, 32, 64, 512] {
        for (name, weights) in &formats {
            let x: Vec<Tensor> = weights.iter().map(|w| random(rows, w.dims()[1], DType::BF16)).collect();
            group.bench_function(format!("{rows} rows {name}"), |b| {
                b.iter(|| {
                    for (x, w) in x.iter().zip(weights) {
                        black_box(linear_packed_f32(black_box(x), w, None).unwrap());
                    }
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, training, decoding, weights_only);
criterion_main!(benches);
