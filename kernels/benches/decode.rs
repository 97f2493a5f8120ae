//! A step of decoding at the shape of a small model: attention and linear maps of all layers by turns, whose caches and
//! weights together fit no second-level cache, and each of them where it does.

use std::hint::black_box;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use criterion::{Bencher, Criterion, Throughput, criterion_group, criterion_main};
use tandem_kernels::attention::{AttentionSpec, KvCacheLayer, append_decode_attention};
use tandem_kernels::gemm::{PackedMatrix, linear_packed_f32};

// The allocator of the programs: a fresh output costs a page fault for every 4 KiB, a reused one does not.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

struct Shape {
    name: &'static str,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    mlp: usize,
}

const SHAPES: [Shape; 2] = [
    Shape { name: "small", layers: 8, heads: 8, kv_heads: 8, head_dim: 32, mlp: 688 },
    Shape { name: "smollm", layers: 30, heads: 9, kv_heads: 3, head_dim: 64, mlp: 1536 },
];
/// Sequences at once.
const ROWS: usize = 16;

fn random(rows: usize, columns: usize, dtype: DType) -> Tensor {
    Tensor::rand(-1f32, 1., (rows, columns), &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

/// What a layer reads.
struct Layer {
    cache: KvCacheLayer,
    qkv: Tensor,
    /// Each with its input.
    maps: [(Tensor, PackedMatrix); 4],
}

impl Layer {
    fn attend(&self, rows: &[(usize, usize)], spec: &AttentionSpec) {
        black_box(append_decode_attention(black_box(&self.qkv), &self.cache, rows, spec).unwrap());
    }

    fn map(&self, maps: std::ops::Range<usize>) {
        for (x, w) in &self.maps[maps] {
            black_box(linear_packed_f32(black_box(x), w, None).unwrap());
        }
    }
}

fn decoding(c: &mut Criterion) {
    for shape in SHAPES {
        for dtype in [DType::BF16, DType::F32] {
            step(c, &shape, dtype);
        }
    }
}

fn step(c: &mut Criterion, shape: &Shape, dtype: DType) {
    let &Shape { name, layers, heads, kv_heads, head_dim, mlp } = shape;
    let scale = 1.0 / (head_dim as f32).sqrt();
    let spec = AttentionSpec { heads, kv_heads, head_dim, causal: true, window: None, scale };
    let hidden = heads * head_dim;
    // Half way through 128 new tokens after prompts of 64 to 128.
    let lens: Vec<usize> = (0..ROWS).map(|row| 128 + row * 37 % 64).collect();
    let rows: Vec<(usize, usize)> = lens.iter().enumerate().map(|(slot, &len)| (slot, len)).collect();
    let layer = |_| {
        let cache = KvCacheLayer::new(ROWS, 256, kv_heads, head_dim, dtype).unwrap();
        for &(slot, len) in &rows {
            let places: Vec<_> = (0..len).map(|position| (slot, position)).collect();
            cache.append(&random(len, spec.qkv_width(), dtype), heads, &places).unwrap();
        }
        let map = |n, k| (random(ROWS, k, dtype), PackedMatrix::new(&random(n, k, dtype)).unwrap());
        let maps =
            [(spec.qkv_width(), hidden), (hidden, hidden), (2 * mlp, hidden), (hidden, mlp)].map(|(n, k)| map(n, k));
        Layer { cache, qkv: random(ROWS, spec.qkv_width(), dtype), maps }
    };
    let layers: Vec<Layer> = (0..layers).map(layer).collect();
    let size = dtype.size_in_bytes();
    let (cached, mapped) = (
        lens.iter().sum::<usize>() * 2 * kv_heads * head_dim * size,
        layers[0].maps.iter().map(|(_, w)| w.dims()[0] * w.dims()[1] * size).sum::<usize>(),
    );
    // A caller from outside would wait for a thread of the pool to wake up.
    let pool = rayon::ThreadPoolBuilder::new().build().unwrap();
    let mut group = c.benchmark_group(format!("{name} step {}", dtype.as_str()));
    group.sample_size(20).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(500));
    // Each part in the company of the other.
    for (part, bytes) in [("attention", cached), ("maps", mapped)] {
        group.throughput(Throughput::Bytes((bytes * layers.len()) as u64));
        group.bench_function(part, |b| {
            b.iter_custom(|times| {
                pool.install(|| {
                    let mut spent = [Duration::ZERO; 2];
                    for _ in 0..times {
                        for layer in &layers {
                            let start = Instant::now();
                            layer.map(0..1);
                            let middle = Instant::now();
                            layer.attend(&rows, &spec);
                            let end = Instant::now();
                            layer.map(1..4);
                            spent[0] += end - middle;
                            spent[1] += (middle - start) + end.elapsed();
                        }
                    }
                    spent[usize::from(part == "maps")]
                })
            });
        });
    }
    // Two sequences and one layer's maps fit a second-level cache.
    let near: usize = lens[..2].iter().sum::<usize>() * 2 * kv_heads * head_dim * size;
    group.throughput(Throughput::Bytes(near as u64));
    group.bench_function("attention of two rows, near", |b| {
        let qkv = layers[0].qkv.narrow(0, 0, 2).unwrap();
        repeat(b, &pool, || {
            black_box(append_decode_attention(black_box(&qkv), &layers[0].cache, &rows[..2], &spec).unwrap());
        });
    });
    group.throughput(Throughput::Bytes(layers[0].maps[1].1.size_bytes() as u64));
    group.bench_function("output map, near", |b| repeat(b, &pool, || layers[0].map(1..2)));
    group.finish();
}

/// Repeats what fits a second-level cache.
fn repeat(b: &mut Bencher<'_>, pool: &rayon::ThreadPool, work: impl Fn() + Sync) {
    b.iter_custom(|times| {
        pool.install(|| {
            let start = Instant::now();
            (0..times).for_each(|_| work());
            start.elapsed()
        })
    });
}

criterion_group!(benches, decoding);
criterion_main!(benches);
