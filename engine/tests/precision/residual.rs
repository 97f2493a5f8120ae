//! The residual stream is f32: what a block adds counts, however small it is beside what is there already.

use tandem_engine::model::spec::{Family, ModelSpec, NormKind, PositionKind};
use tandem_engine::model::unit::{
    DOWN_BIAS, EMBEDDING, FINAL_NORM, Head, NORM1, NORM2, OUTPUT_BIAS, UnitBuffer, UnitLayout,
};
use tandem_engine::{Model, Packed, Precision};
use tandem_kernels::mlp::Activation;

const LAYERS: usize = 256;
const HIDDEN: usize = 16;
const VOCABULARY: usize = 64;
/// Less than half of the distance from a number of magnitude 1 to the next one in bf16, 2⁻⁷.
const TERM: f32 = 1.0 / 512.0;

/// Blocks that do nothing but add a bias to the stream, twice each.
fn spec() -> ModelSpec {
    ModelSpec {
        family: Family::Gpt2,
        vocab_size: VOCABULARY,
        hidden: HIDDEN,
        layers: LAYERS,
        heads: 2,
        kv_heads: 2,
        head_dim: 8,
        mlp_width: 16,
        activation: Activation::GeluTanh,
        gated: false,
        norm: NormKind::Layer,
        norm_eps: 1e-5,
        post_norm: false,
        positions: PositionKind::Learned { offset: 0 },
        max_positions: 16,
        qkv_bias: true,
        output_bias: true,
        mlp_bias: true,
        window: None,
        tied: true,
        embedding_width: None,
        init_std: 0.02,
        dropout: 0.0,
    }
}

/// Embeddings of magnitudes 1 to 2, and blocks that add `term` in half of the places, `-term` in the others.
fn model(term: f32) -> Model {
    let unit = |layout: UnitLayout| {
        let mut flat = vec![0f32; layout.len()];
        for slot in &layout.params {
            let fill = |at: usize| match slot.name {
                EMBEDDING => {
                    let mixed = (at as u32).wrapping_mul(0x9e37_79b9) >> 8;
                    let magnitude = 1.0 + (mixed % 1000) as f32 / 1000.0;
                    if (mixed / 1000).is_multiple_of(2) { magnitude } else { -magnitude }
                }
                OUTPUT_BIAS | DOWN_BIAS => {
                    if at.is_multiple_of(2) {
                        term
                    } else {
                        -term
                    }
                }
                NORM1 | NORM2 | FINAL_NORM => 1.0,
                _ => 0.0,
            };
            (0..slot.len()).for_each(|at| flat[slot.offset + at] = fill(at));
        }
        UnitBuffer::from_vec(&layout.into(), flat).unwrap()
    };
    let units = UnitLayout::all(&spec(), Head::Language).into_iter().map(unit).collect();
    Model::from_parts(spec(), Head::Language, units).unwrap()
}

fn logits(model: &Model) -> Vec<f32> {
    let batch = Packed::from_sequences([(0..12).collect::<Vec<u32>>(), vec![40, 50, 60]]);
    model.logits(&batch).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn rms(values: impl Iterator<Item = f32> + Clone) -> f64 {
    let count = values.clone().count() as f64;
    (values.map(|value| f64::from(value).powi(2)).sum::<f64>() / count).sqrt()
}

/// All terms of 256 blocks together are as large as the embedding. In a stream of bf16 they would all be rounded away. Here the
/// stream is exact to f32, and rounded are the bias (exact: a power of two), the embedding, the norm's output and the head's
/// weights: three roundings of at most 2⁻⁸ on the way to a logit, each a sum of `HIDDEN` such products.
#[test]
fn small_terms_add_up() {
    let (with, without) = (model(TERM), model(0.0));
    let expected = logits(&with);
    let found = logits(&with.with_precision(Precision::Bf16).unwrap());
    let scale = rms(expected.iter().copied());
    let error = rms(found.iter().zip(&expected).map(|(a, b)| a - b));
    let lost = rms(logits(&without).iter().zip(&expected).map(|(a, b)| a - b));
    println!("logits of {scale:.3}: error {:.5}, without the blocks {:.3} of it", error / scale, lost / scale);
    assert!(lost > 0.1 * scale, "the blocks hardly matter");
    assert!(error <= 3.0 / 256.0 * scale, "error {error} of {scale}");
}
