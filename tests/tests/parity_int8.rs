//! Every family with its linear maps in 8 bits: the model of the weights that these stand for, and near the model that they
//! were made from.

use candle_core::Tensor;
use tandem_engine::model::Model;
use tandem_engine::model::unit::Head;
use tandem_engine::{Precision, WeightFormat};
use tandem_tests::golden::{CAUSAL, Vectors, floats, model};

const UNIT: f64 = 1.0 / 256.0;

fn int8(name: &str) -> Model {
    model(name, Head::Language).frozen(Precision::Bf16, WeightFormat::Int8).unwrap()
}

fn rms(values: impl Iterator<Item = f64>, count: usize) -> f64 {
    (values.map(|value| value * value).sum::<f64>() / count as f64).sqrt()
}

/// Of the roundings of bf16 that `parity_bf16.rs` counts on the way to a logit, two in each branch are those of the maps'
/// weights, which are exact here: `n = 5 + 12·layers (+ 6)`, and an error of `√n · u` of the magnitude of what is summed at
/// most. The bound must not be more than 8 times what is measured.
#[test]
fn logits_are_those_of_the_weights_that_are_multiplied_with() {
    for name in CAUSAL {
        let (batch, int8) = (Vectors::of(name).batch(), int8(name));
        let of_weights = Model::from_parts(int8.spec().clone(), Head::Language, int8.units().unwrap()).unwrap();
        let [wanted, found] = [&of_weights, &int8].map(|model| floats(&model.logits(&batch).unwrap()));
        let projections = if int8.spec().embedding_width.is_some() { 6 } else { 0 };
        let roundings = (5 + 12 * int8.spec().layers + projections) as f64;
        let scale = rms(wanted.iter().map(|value| f64::from(*value)), wanted.len());
        let error = rms(wanted.iter().zip(&found).map(|(a, b)| f64::from(a - b)), wanted.len());
        let bound = roundings.sqrt() * UNIT * scale;
        println!("{name}: {error:.2e}, {:.2} of the bound", error / bound);
        assert!(error <= bound && 8.0 * error >= bound, "{name}: error {error:e}, bound {bound:e}");
    }
}

/// Logits point the way that those of the f32 model point.
#[test]
fn logits_are_near_those_of_the_model() {
    for name in CAUSAL {
        let (batch, int8) = (Vectors::of(name).batch(), int8(name));
        let [wanted, found] = [&model(name, Head::Language), &int8].map(|model| floats(&model.logits(&batch).unwrap()));
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let cosine = dot(&wanted, &found) / (dot(&wanted, &wanted) * dot(&found, &found)).sqrt();
        println!("{name}: 1 - cosine = {:.1e}", 1.0 - cosine);
        assert!(cosine >= 0.999, "{name}: {cosine}");
        assert!(wanted != found);
    }
}

/// No weight is further from the original than half of its row's scale, which is the row's largest magnitude through 127.
#[test]
fn weights_are_off_by_half_a_scale() {
    for name in CAUSAL {
        let (original, int8) = (model(name, Head::Language).units().unwrap(), int8(name).units().unwrap());
        for (original, int8) in original.iter().zip(&int8).skip(1) {
            for slot in original.layout().params.iter().filter(|slot| slot.shape.len() == 2) {
                let [was, is] = [original, int8].map(|unit| unit.get(slot.name).unwrap().to_vec2::<f32>().unwrap());
                for (was, is) in was.iter().zip(&is) {
                    let most = was.iter().fold(0f32, |most, value| most.max(value.abs())) / 127.0;
                    // The scale is rounded up to 17 bits, the quotient to 24.
                    let bound = most * (0.5 + 127.0 / 65536.0 + 127.0 / 16_777_216.0);
                    assert!(was.iter().zip(is).all(|(was, is)| (was - is).abs() <= bound), "{name}: {}", slot.name);
                }
            }
        }
        let same = |a: &Tensor, b: &Tensor| a.to_vec1::<f32>().unwrap() == b.to_vec1::<f32>().unwrap();
        assert!(!same(original[1].flat(), int8[1].flat()));
    }
}
