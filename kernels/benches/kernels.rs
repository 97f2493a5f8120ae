//! Attention, norms and gated units at the shapes of the example models, training and decoding.

use std::hint::black_box;

use candle_core::{DType, Device, Tensor};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tandem_kernels::attention::{AttentionSpec, KvCacheLayer, attention, attention_backward, decode_attention};

// The allocator of the programs: a fresh output costs a page fault for every 4 KiB, a reused one does not.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

struct Shape {
    name: &'static str,
    sequences: usize,
    len: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

const SHAPES: [Shape; 2] = [
    Shape { name: "small", sequences: 16, len: 256, heads: 8, kv_heads: 8, head_dim: 32 },
    Shape { name: "smollm", sequences: 4, len: 512, heads: 9, kv_heads: 3, head_dim: 64 },
];

fn random(shape: &[usize]) -> Tensor {
    Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap()
}

fn bench_attention(c: &mut Criterion) {
    for shape in SHAPES {
        for dtype in [DType::F32, DType::BF16] {
            bench_attention_of(c, &shape, dtype);
        }
    }
}

fn bench_attention_of(c: &mut Criterion, shape: &Shape, dtype: DType) {
    let &Shape { name, sequences, len, heads, kv_heads, head_dim } = shape;
    let scale = 1.0 / (head_dim as f32).sqrt();
    let spec = AttentionSpec { heads, kv_heads, head_dim, causal: true, window: None, scale };
    let cuts: Vec<u32> = (0..=sequences).map(|i| (i * len) as u32).collect();
    let random = |shape: &[usize]| random(shape).to_dtype(dtype).unwrap();
    let (qkv, d_o) = (random(&[sequences * len, spec.qkv_width()]), random(&[sequences * len, spec.output_width()]));
    let (o, saved) = attention(&qkv, &cuts, &spec).unwrap();
    let mut group = c.benchmark_group(format!("{name} attention {}", dtype.as_str()));
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
    let cache = KvCacheLayer::new(slots, len, kv_heads, head_dim, dtype).unwrap();
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

criterion_group!(benches, bench_attention);
criterion_main!(benches);
