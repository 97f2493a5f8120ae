//! Decoding against the cache gives the bits of the training forward.

mod common;

use candle_core::{DType, Tensor};
use common::{tensor, with_threads};
use tandem_kernels::Error;
use tandem_kernels::attention::{AttentionSpec, KvCacheLayer, append_decode_attention, attention, decode_attention};

/// As in the programs: large blocks start at a cache line, so that tiles can load rows where they lie.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const LEN: usize = 200;

fn specs() -> Vec<AttentionSpec> {
    let groups = [(2, 2, 16), (4, 2, 32), (3, 1, 64), (2, 2, 80), (1, 1, 128), (6, 2, 20), (8, 1, 32)];
    let windows = [None, Some(17), Some(64), Some(100)];
    let mut specs = Vec::new();
    for (heads, kv_heads, head_dim) in groups {
        for window in windows {
            let scale = 1.0 / (head_dim as f32).sqrt();
            specs.push(AttentionSpec { heads, kv_heads, head_dim, causal: true, window, scale });
        }
    }
    specs
}

fn cache(slots: usize, spec: &AttentionSpec, dtype: DType) -> KvCacheLayer {
    KvCacheLayer::new(slots, LEN, spec.kv_heads, spec.head_dim, dtype).unwrap()
}

const DTYPES: [DType; 2] = [DType::F32, DType::BF16];

/// Every head shape and window, in f32 and bf16.
fn cases() -> Vec<(AttentionSpec, DType)> {
    specs().into_iter().flat_map(|spec| DTYPES.map(|dtype| (spec, dtype))).collect()
}

fn random(shape: &[usize], seed: u64, dtype: DType) -> Tensor {
    common::random(shape, seed).to_dtype(dtype).unwrap()
}

/// Bits, after widening bf16.
fn bits(t: &Tensor) -> Vec<u32> {
    common::bits(&t.to_dtype(DType::F32).unwrap())
}

fn row(t: &Tensor, at: usize, count: usize) -> Tensor {
    t.narrow(0, at, count).unwrap().copy().unwrap()
}

#[test]
fn every_length_has_the_bits_of_the_forward() {
    for (spec, dtype) in cases() {
        let qkv = random(&[LEN, spec.qkv_width()], 1, dtype);
        let (o, _) = attention(&qkv, &[0, LEN as u32], &spec).unwrap();
        let cache = cache(1, &spec, dtype);
        for t in 0..LEN {
            let new = row(&qkv, t, 1);
            cache.append(&new, spec.heads, &[(0, t)]).unwrap();
            let got = decode_attention(&new, &cache, &[(0, t + 1)], &spec).unwrap();
            assert_eq!(bits(&got), bits(&row(&o, t, 1)), "{dtype:?} {spec:?} length {}", t + 1);
        }
    }
}

#[test]
fn a_prompt_read_in_pieces_has_the_bits_of_the_forward() {
    for (spec, dtype) in cases() {
        let qkv = random(&[LEN, spec.qkv_width()], 2, dtype);
        let (o, _) = attention(&qkv, &[0, LEN as u32], &spec).unwrap();
        let cache = cache(3, &spec, dtype);
        let mut start = 0;
        for piece in [1, 62, 3, 70, 64] {
            let entries: Vec<_> = (start..start + piece).map(|t| (2, t)).collect();
            let rows: Vec<_> = (start..start + piece).map(|t| (2, t + 1)).collect();
            let new = row(&qkv, start, piece);
            cache.append(&new, spec.heads, &entries).unwrap();
            let got = decode_attention(&new, &cache, &rows, &spec).unwrap();
            assert_eq!(bits(&got), bits(&row(&o, start, piece)), "{dtype:?} {spec:?} from {start}");
            start += piece;
        }
        assert_eq!(start, LEN);
    }
}

#[test]
fn slots_do_not_mix() {
    for (spec, dtype) in cases() {
        // Three sequences of different length, decoded together, in an order that is not that of the slots.
        let lengths = [70, 5, 130];
        let slots = [2, 0, 1];
        let sequences: Vec<Tensor> =
            (0..3).map(|n| random(&[lengths[n], spec.qkv_width()], 10 + n as u64, dtype)).collect();
        let cache = cache(3, &spec, dtype);
        for n in 0..3 {
            let entries: Vec<_> = (0..lengths[n]).map(|t| (slots[n], t)).collect();
            cache.append(&sequences[n], spec.heads, &entries).unwrap();
        }
        let last: Vec<Tensor> = (0..3).map(|n| row(&sequences[n], lengths[n] - 1, 1)).collect();
        let batch = Tensor::cat(&last, 0).unwrap();
        let rows: Vec<_> = (0..3).map(|n| (slots[n], lengths[n])).collect();
        let run = |threads| with_threads(threads, || decode_attention(&batch, &cache, &rows, &spec)).unwrap();
        let got = run(1);
        assert_eq!(bits(&got), bits(&run(3)));
        for n in 0..3 {
            let (o, _) = attention(&sequences[n], &[0, lengths[n] as u32], &spec).unwrap();
            assert_eq!(bits(&row(&got, n, 1)), bits(&row(&o, lengths[n] - 1, 1)), "{dtype:?} {spec:?} sequence {n}");
        }
    }
}

#[test]
fn appending_along_the_way_gives_the_same_bits() {
    for (spec, dtype) in cases() {
        // Slots of different lengths step together, over the borders of halves and of blocks.
        let (starts, slots, steps) = ([0, 28, 63, 90], [1, 3, 0, 2], 40);
        let sequence = |n: usize| random(&[starts[n] + steps, spec.qkv_width()], 20 + n as u64, dtype);
        let sequences: Vec<Tensor> = (0..4).map(sequence).collect();
        let whole = |n: usize| attention(&sequences[n], &[0, (starts[n] + steps) as u32], &spec).unwrap().0;
        let want: Vec<Tensor> = (0..4).map(whole).collect();
        for threads in [1, 3] {
            let cache = cache(4, &spec, dtype);
            let all: Vec<_> = (0..LEN).map(|t| (3, t)).collect();
            let stale = tensor(&vec![f32::NAN; LEN * spec.qkv_width()], &[LEN, spec.qkv_width()]);
            cache.append(&stale.to_dtype(dtype).unwrap(), spec.heads, &all).unwrap();
            for n in 0..4 {
                let entries: Vec<_> = (0..starts[n]).map(|t| (slots[n], t)).collect();
                cache.append(&row(&sequences[n], 0, starts[n]), spec.heads, &entries).unwrap();
            }
            for step in 0..steps {
                let new: Vec<Tensor> = (0..4).map(|n| row(&sequences[n], starts[n] + step, 1)).collect();
                let (batch, rows) =
                    (Tensor::cat(&new, 0).unwrap(), [0, 1, 2, 3].map(|n| (slots[n], starts[n] + step + 1)));
                let got = with_threads(threads, || append_decode_attention(&batch, &cache, &rows, &spec)).unwrap();
                for n in 0..4 {
                    let want = row(&want[n], starts[n] + step, 1);
                    assert_eq!(bits(&row(&got, n, 1)), bits(&want), "{dtype:?} {spec:?} sequence {n} step {step}");
                }
            }
        }
    }
}

#[test]
fn what_a_slot_held_before_is_invisible() {
    for (spec, dtype) in cases() {
        let cache = cache(2, &spec, dtype);
        let stale = tensor(&vec![f32::NAN; LEN * spec.qkv_width()], &[LEN, spec.qkv_width()]).to_dtype(dtype).unwrap();
        cache.append(&stale, spec.heads, &(0..LEN).map(|t| (1, t)).collect::<Vec<_>>()).unwrap();
        let qkv = random(&[90, spec.qkv_width()], 3, dtype);
        cache.append(&qkv, spec.heads, &(0..90).map(|t| (1, t)).collect::<Vec<_>>()).unwrap();
        let (o, _) = attention(&qkv, &[0, 90], &spec).unwrap();
        let got = decode_attention(&row(&qkv, 89, 1), &cache, &[(1, 90)], &spec).unwrap();
        assert_eq!(bits(&got), bits(&row(&o, 89, 1)));
    }
}

#[test]
fn samples_of_one_prompt_share_its_prefix() {
    for (spec, dtype) in cases() {
        let cache = cache(3, &spec, dtype);
        let prompt = random(&[75, spec.qkv_width()], 4, dtype);
        cache.append(&prompt, spec.heads, &(0..75).map(|t| (0, t)).collect::<Vec<_>>()).unwrap();
        cache.copy_prefix(0, 2, 75).unwrap();
        for (slot, seed) in [(0, 5), (2, 6)] {
            let next = random(&[1, spec.qkv_width()], seed, dtype);
            cache.append(&next, spec.heads, &[(slot, 75)]).unwrap();
            let got = decode_attention(&next, &cache, &[(slot, 76)], &spec).unwrap();
            let whole = Tensor::cat(&[&prompt, &next], 0).unwrap();
            let (o, _) = attention(&whole, &[0, 76], &spec).unwrap();
            assert_eq!(bits(&got), bits(&row(&o, 75, 1)), "slot {slot}");
        }
    }
}

#[test]
fn bf16_takes_half_the_bytes() {
    let bytes = |dtype| KvCacheLayer::new(3, LEN, 2, 64, dtype).unwrap().size_bytes();
    assert_eq!(2 * bytes(DType::BF16), bytes(DType::F32));
    assert!(KvCacheLayer::new(3, LEN, 2, 64, DType::F16).is_err());
    let (spec, _) = cases()[0];
    let cache = cache(1, &spec, DType::BF16);
    let qkv = random(&[1, spec.qkv_width()], 1, DType::F32);
    assert!(cache.append(&qkv, spec.heads, &[(0, 0)]).is_err());
    assert!(decode_attention(&qkv, &cache, &[(0, 1)], &spec).is_err());
}

#[test]
fn misfits_are_errors() {
    let (spec, dtype) = cases()[0];
    let cache = cache(2, &spec, dtype);
    assert_eq!(cache.max_len(), 256);
    let qkv = random(&[1, spec.qkv_width()], 1, dtype);
    assert!(matches!(cache.append(&qkv, 2, &[(2, 0)]), Err(Error::Index { what: "slot", index: 2, .. })));
    assert!(matches!(cache.append(&qkv, 2, &[(0, 256)]), Err(Error::Index { what: "position", index: 256, .. })));
    assert!(cache.append(&qkv, 2, &[(0, 0), (0, 1)]).is_err());
    assert!(decode_attention(&qkv, &cache, &[(0, 0)], &spec).is_err());
    assert!(decode_attention(&qkv, &cache, &[(0, 257)], &spec).is_err());
    assert!(decode_attention(&qkv, &cache, &[(5, 1)], &spec).is_err());
    let two = random(&[2, spec.qkv_width()], 1, dtype);
    assert!(append_decode_attention(&two, &cache, &[(1, 1), (1, 2)], &spec).is_err());
    assert!(decode_attention(&qkv, &cache, &[(0, 1)], &AttentionSpec { causal: false, ..spec }).is_err());
    let other = AttentionSpec { heads: 4, kv_heads: 4, head_dim: 8, ..spec };
    assert!(decode_attention(&qkv, &cache, &[(0, 1)], &other).is_err());
    assert!(cache.copy_prefix(0, 1, 257).is_err());
    assert!(KvCacheLayer::new(1, 0, 1, 16, DType::F32).is_err());
}
