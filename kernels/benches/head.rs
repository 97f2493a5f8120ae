//! The head, the sampler and the optimizer; the head beside the matrix products that it cannot do without.

use std::hint::black_box;

use candle_core::{DType, Device, Tensor};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tandem_kernels::gemm::{linear, linear_input_grad, linear_weight_grad};
use tandem_kernels::logprob::{head_logprob, head_logprob_backward, head_logprob_with_backward};
use tandem_kernels::optimizer::{AdamWConfig, adamw_step};
use tandem_kernels::sample::{SamplingParams, sample_row};

/// (name, rows, vocabulary, width).
const SHAPES: [(&str, usize, usize, usize); 2] = [("small", 4096, 8192, 256), ("smollm", 1024, 49152, 576)];

fn random(shape: &[usize]) -> Tensor {
    Tensor::randn(0f32, 0.1, shape, &Device::Cpu).unwrap()
}

fn head(c: &mut Criterion) {
    for dtype in [DType::F32, DType::BF16] {
        head_of(c, dtype);
    }
}

fn head_of(c: &mut Criterion, dtype: DType) {
    for (name, rows, vocabulary, width) in SHAPES {
        let of = |shape: &[usize]| random(shape).to_dtype(dtype).unwrap();
        let (h, w, dlogp) = (of(&[rows, width]), of(&[vocabulary, width]), random(&[rows]));
        let dw = Tensor::zeros((vocabulary, width), DType::F32, &Device::Cpu).unwrap();
        let labels: Vec<u32> = (0..rows).map(|row| (row * 7919 % vocabulary) as u32).collect();
        let mut group = c.benchmark_group(format!("head {name} {}", dtype.as_str()));
        group.sample_size(10);
        let out = head_logprob(&h, &w, None, &labels, 1.0).unwrap();
        group.bench_function("forward", |b| {
            b.iter(|| head_logprob(black_box(&h), &w, None, &labels, 1.0).unwrap());
        });
        group.bench_function("backward", |b| {
            b.iter(|| head_logprob_backward(&dlogp, None, black_box(&h), &w, None, &labels, &out, &dw, None).unwrap());
        });
        group.bench_function("both at once", |b| {
            b.iter(|| head_logprob_with_backward(&dlogp, black_box(&h), &w, &labels, 1.0, &dw).unwrap());
        });
        group.bench_function("products of both passes", |b| {
            b.iter(|| {
                for _ in 0..2 {
                    black_box(linear(&h, &w, None).unwrap());
                }
                let dlogits = linear(&h, &w, None).unwrap();
                linear_weight_grad(&dlogits, &h, &dw).unwrap();
                linear_input_grad(&dlogits, &w).unwrap()
            });
        });
        group.finish();
    }
}

fn sampler(c: &mut Criterion) {
    let logits: Vec<f32> = random(&[49152]).affine(20.0, 0.0).unwrap().to_vec1().unwrap();
    let plain = SamplingParams::default();
    let mut group = c.benchmark_group("sample 49152");
    for (name, params) in [
        ("greedy", SamplingParams::greedy()),
        ("plain", plain),
        ("temperature", SamplingParams { temperature: 0.8, ..plain }),
        ("top-k 50", SamplingParams { top_k: 50, ..plain }),
        ("top-p 0.9", SamplingParams { top_p: 0.9, ..plain }),
        ("min-p 0.05", SamplingParams { min_p: 0.05, ..plain }),
    ] {
        group.bench_function(name, |b| b.iter(|| sample_row(black_box(&logits), &[], &params, 0.37).unwrap()));
    }
    group.finish();
}

fn optimizer(c: &mut Criterion) {
    let len = 8 << 20;
    let (param, grad) = (random(&[len]), random(&[len]));
    let [m, v] = [(); 2].map(|()| Tensor::zeros(len, DType::F32, &Device::Cpu).unwrap());
    let config = AdamWConfig::default();
    let mut group = c.benchmark_group("adamw 8 Mi");
    group.sample_size(20).throughput(Throughput::Bytes(7 * 4 * len as u64));
    group.bench_function("step", |b| {
        b.iter(|| adamw_step(&param, &grad, &m, &v, 1e-4, 0.1, 10, 1.0, &config).unwrap());
    });
    group.finish();
}

criterion_group!(benches, head, sampler, optimizer);
criterion_main!(benches);
