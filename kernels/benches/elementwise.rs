//! Kernels that are bound by memory, in f32 and bf16, at the shapes of the example models: bytes read and written per second.

use std::hint::black_box;
use std::time::Duration;

use candle_core::{DType, Device, Tensor};
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime};
use tandem_kernels::dropout::dropout;
use tandem_kernels::embedding::embedding;
use tandem_kernels::mlp::{Activation, activation, gated, gated_backward};
use tandem_kernels::norm::{
    add_rms_norm, layer_norm, layer_norm_backward, rms_norm, rms_norm_backward, rms_norm_backward_add,
};
use tandem_kernels::optimizer::{AdamWConfig, adamw_slice};
use tandem_kernels::rng::{Philox, Purpose};
use tandem_kernels::rope::{RopeTable, rope_qkv};
use tandem_kernels::slice::{narrow_slice, to_bf16, widen_slice, with_slice_of};

/// As in the programs: it keeps freed memory for the next tensor.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const TOKENS: usize = 4096;
const WIDTH: usize = 256;
const MLP_WIDTH: usize = 688;
const HEADS: usize = 8;
const VOCABULARY: usize = 8192;

fn random(shape: &[usize], dtype: DType) -> Tensor {
    Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

/// Times `f`, which reads and writes so many bytes.
fn measure<R>(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, bytes: usize, mut f: impl FnMut() -> R) {
    group.throughput(Throughput::Bytes(bytes as u64));
    group.bench_function(name, |b| b.iter(|| black_box(f())));
}

fn bench_rows(c: &mut Criterion) {
    for dtype in [DType::F32, DType::BF16] {
        let mut group = c.benchmark_group(format!("{dtype:?}"));
        group.sample_size(10).warm_up_time(Duration::from_millis(100)).measurement_time(Duration::from_millis(300));
        let size = dtype.size_in_bytes();
        let (rows, wide) = (TOKENS * WIDTH, TOKENS * MLP_WIDTH);
        let (x, out) = (random(&[TOKENS, WIDTH], DType::F32), random(&[TOKENS, WIDTH], dtype));
        let (w, b) = (random(&[WIDTH], dtype), random(&[WIDTH], dtype));
        let (dw, db) = (random(&[WIDTH], DType::F32), random(&[WIDTH], DType::F32));
        let (_, stats) = rms_norm(&x, &w, 1e-5).unwrap();
        measure(&mut group, "rms norm", rows * (4 + size), || rms_norm(&x, &w, 1e-5).unwrap());
        measure(&mut group, "add + rms norm", rows * (8 + 2 * size), || add_rms_norm(&x, &out, &w, 1e-5).unwrap());
        measure(&mut group, "rms norm backward", rows * (8 + size), || {
            rms_norm_backward(&out, &x, &w, &stats, &dw).unwrap()
        });
        measure(&mut group, "rms norm backward + add", rows * (12 + size), || {
            rms_norm_backward_add(&out, &x, &w, &stats, &x, &dw).unwrap()
        });
        measure(&mut group, "layer norm", rows * (4 + size), || layer_norm(&x, &w, &b, 1e-5).unwrap());
        let (_, stats) = layer_norm(&x, &w, &b, 1e-5).unwrap();
        measure(&mut group, "layer norm backward", rows * (8 + size), || {
            layer_norm_backward(&out, &x, &w, &stats, &dw, &db).unwrap()
        });
        let (gate_up, dy) = (random(&[TOKENS, 2 * MLP_WIDTH], dtype), random(&[TOKENS, MLP_WIDTH], dtype));
        measure(&mut group, "gated silu", 3 * wide * size, || gated(&gate_up, Activation::Silu).unwrap());
        measure(&mut group, "gated silu backward", 5 * wide * size, || {
            gated_backward(&dy, &gate_up, Activation::Silu).unwrap()
        });
        measure(&mut group, "silu", 2 * wide * size, || activation(&dy, Activation::Silu).unwrap());
        measure(&mut group, "gelu erf", 2 * wide * size, || activation(&dy, Activation::GeluErf).unwrap());
        let qkv = random(&[TOKENS, 3 * WIDTH], dtype);
        let table = RopeTable::new(WIDTH / HEADS, TOKENS, 1e4, None).unwrap();
        let positions: Vec<u32> = (0..TOKENS as u32).map(|t| t % 256).collect();
        // Queries and keys, read and written.
        measure(&mut group, "rope there and back", 8 * rows * size, || {
            rope_qkv(&qkv, HEADS, HEADS, &table, &positions, false).unwrap();
            rope_qkv(&qkv, HEADS, HEADS, &table, &positions, true).unwrap();
        });
        let philox = Philox::new(1, Purpose::Dropout, 1);
        let addresses: Vec<(u64, u32)> = positions.iter().map(|&position| (3, position)).collect();
        measure(&mut group, "dropout", 2 * rows * size, || dropout(&out, 0.1, &philox, 1, &addresses).unwrap());
        let lookup = random(&[VOCABULARY, WIDTH], dtype);
        let ids: Vec<u32> = (0..TOKENS).map(|t| (t * 7919 % VOCABULARY) as u32).collect();
        measure(&mut group, "embedding", rows * (4 + size), || embedding(&lookup, &ids).unwrap());
        group.finish();
    }
}

fn bench_flat(c: &mut Criterion) {
    const LEN: usize = 8 << 20;
    let mut group = c.benchmark_group("flat");
    group.sample_size(10).warm_up_time(Duration::from_millis(100)).measurement_time(Duration::from_millis(300));
    let fill = |value: f32| vec![value; LEN];
    let (mut param, grad, mut m, mut v) = (fill(0.1), fill(0.2), fill(0.0), fill(0.0));
    let mut copy = with_slice_of(&random(&[LEN], DType::BF16), <[half::bf16]>::to_vec).unwrap();
    let config = AdamWConfig::default();
    measure(&mut group, "adamw", LEN * 28, || {
        adamw_slice(&mut param, &grad, &mut m, &mut v, 1e-9, 0.0, 9, 1.0, &config).unwrap();
    });
    measure(&mut group, "narrow", LEN * 6, || narrow_slice(&grad, &mut copy).unwrap());
    measure(&mut group, "widen", LEN * 6, || widen_slice(&copy, &mut m).unwrap());
    let tensor = random(&[TOKENS, WIDTH], DType::F32);
    measure(&mut group, "to bf16, new tensor", TOKENS * WIDTH * 6, || to_bf16(&tensor).unwrap());
    // What the machine gives: a copy without arithmetic, on one thread.
    measure(&mut group, "memcpy, one thread", LEN * 8, || m.copy_from_slice(&grad));
    group.finish();
}

criterion_group!(benches, bench_rows, bench_flat);
criterion_main!(benches);
