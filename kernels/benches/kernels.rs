//! Attention, norms and gated units at the shapes of the example models, training and decoding.

use std::hint::black_box;

use candle_core::{Device, Tensor};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tandem_kernels::attention::{AttentionSpec, KvCacheLayer, attention, attention_backward, decode_attention};
use tandem_kernels::mlp::{Activation, gated, gated_backward};
use tandem_kernels::norm::{rms_norm, rms_norm_backward};

struct Shape {
    name: &'static str,
    sequences: usize,
    len: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    mlp_width: usize,
}

const SHAPES: [Shape; 2] = [
    Shape { name: "small", sequences: 16, len: 256, heads: 8, kv_heads: 8, head_dim: 32, mlp_width: 688 },
    Shape { name: "smollm", sequences: 4, len: 512, heads: 9, kv_heads: 3, head_dim: 64, mlp_width: 1536 },
];

fn random(shape: &[usize]) -> Tensor {
    Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap()
}

fn bench_attention(c: &mut Criterion) {
    for Shape { name, sequences, len, heads, kv_heads, head_dim, .. } in SHAPES {
        let scale = 1.0 / (head_dim as f32).sqrt();
        let spec = AttentionSpec { heads, kv_heads, head_dim, causal: true, window: None, scale };
        let cuts: Vec<u32> = (0..=sequences).map(|i| (i * len) as u32).collect();
        let (qkv, d_o) =
            (random(&[sequences * len, spec.qkv_width()]), random(&[sequences * len, spec.output_width()]));
        let (o, saved) = attention(&qkv, &cuts, &spec).unwrap();
        let mut group = c.benchmark_group(format!("{name} attention"));
        group.sample_size(20);
        // Multiply-adds of the visible half of two products forward and five backward, counted as two operations.
        let product = (sequences * heads * len * len * head_dim) as u64;
        group.throughput(Throughput::Elements(2 * product));
        group.bench_function("forward", |b| b.iter(|| attention(black_box(&qkv), &cuts, &spec).unwrap()));
        group.throughput(Throughput::Elements(5 * product));
        group.bench_function("backward", |b| {
            b.iter(|| attention_backward(black_box(&d_o), &qkv, &o, &saved, &cuts, &spec).unwrap());
        });
        let slots = 64;
        let cache = KvCacheLayer::new(slots, len, kv_heads, head_dim).unwrap();
        let prompt = qkv.narrow(0, 0, len).unwrap();
        for slot in 0..slots {
            cache.append(&prompt, heads, &(0..len).map(|t| (slot, t)).collect::<Vec<_>>()).unwrap();
        }
        let (new, rows) = (qkv.narrow(0, 0, slots).unwrap(), (0..slots).map(|slot| (slot, len)).collect::<Vec<_>>());
        group.throughput(Throughput::Bytes((cache.size_bytes()) as u64));
        group.bench_function("decode 64 rows", |b| {
            b.iter(|| decode_attention(black_box(&new), &cache, &rows, &spec).unwrap());
        });
        group.finish();
    }
}

fn bench_rows(c: &mut Criterion) {
    for Shape { name, sequences, len, heads, head_dim, mlp_width, .. } in SHAPES {
        let (tokens, width) = (sequences * len, heads * head_dim);
        let (x, w, dw) = (random(&[tokens, width]), random(&[width]), random(&[width]));
        let (_, stats) = rms_norm(&x, &w, 1e-5).unwrap();
        let (gate_up, dy) = (random(&[tokens, 2 * mlp_width]), random(&[tokens, mlp_width]));
        let mut group = c.benchmark_group(format!("{name} rows"));
        group.sample_size(20).throughput(Throughput::Elements((tokens * width) as u64));
        group.bench_function("rms norm", |b| b.iter(|| rms_norm(black_box(&x), &w, 1e-5).unwrap()));
        group.bench_function("rms norm backward", |b| {
            b.iter(|| rms_norm_backward(black_box(&x), &x, &w, &stats, &dw).unwrap());
        });
        group.throughput(Throughput::Elements((tokens * mlp_width) as u64));
        group.bench_function("gated silu", |b| b.iter(|| gated(black_box(&gate_up), Activation::Silu).unwrap()));
        group.bench_function("gated silu backward", |b| {
            b.iter(|| gated_backward(black_box(&dy), &gate_up, Activation::Silu).unwrap());
        });
        group.finish();
    }
}

criterion_group!(benches, bench_attention, bench_rows);
criterion_main!(benches);
