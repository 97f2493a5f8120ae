//! A head that reads few rows: what the last block leaves out past its attention changes no log-probability, and no gradient but
//! for the order in which rows are added up.

#[path = "lora/adapted.rs"]
#[allow(dead_code, unreachable_pub)]
mod adapted;

use adapted::{FAMILIES, adapted as with_adapters, base, batch, config};
use candle_core::Tensor;
use tandem_engine::model::unit::UnitBuffer;
use tandem_engine::parallel::{Gradients, Placement};
use tandem_engine::{Dropout, LogProbs, Model, Packed, Precision, Recompute};

const LENGTHS: [usize; 5] = [9, 2, 30, 17, 1];

/// Log-probabilities of `labels` at `rows`, and the gradient of their sum weighted by `weights`.
fn trained(
    model: &Model,
    packed: &Packed,
    (rows, labels, weights): (&[u32], &[u32], &[f32]),
    dropout: Option<Dropout>,
    recompute: Recompute,
) -> (Vec<f32>, Vec<UnitBuffer>) {
    let mut grads = Gradients::new(&Placement::solo(), &model.trained_layouts()).unwrap();
    let trace = model.trace(packed, rows, dropout, recompute).unwrap();
    let weights = Tensor::from_slice(weights, weights.len(), &candle_core::Device::Cpu).unwrap();
    let loss = |out: &LogProbs| Ok((&out.logp * &weights)?.sum_all()?);
    let (_, out) = trace.backward_log_probs(labels, &mut grads, loss).unwrap().unwrap();
    (out.logp.to_vec1().unwrap(), grads.in_place().unwrap().unwrap())
}

/// The same loss read at the rows that matter, and read at all rows with zero weight on the others, where nothing is left out.
fn agrees(model: &Model, dropout: Option<Dropout>, recompute: Recompute, what: &str) {
    let (packed, _, _) = batch(model.spec().vocab_size, &LENGTHS);
    let every: Vec<u32> = (0..packed.tokens() as u32).collect();
    let labels: Vec<u32> = every.iter().map(|row| (row * 7 + 1) % model.spec().vocab_size as u32).collect();
    // Responses of two sequences, the last row of a third, and the only row of a fourth.
    let few: Vec<u32> = every.iter().copied().filter(|row| matches!(row, 4..=8 | 10 | 25..=40 | 58)).collect();
    let weight = |row: u32| 0.25 + (row % 5) as f32;
    let few_labels: Vec<u32> = few.iter().map(|&row| labels[row as usize]).collect();
    let few_weights: Vec<f32> = few.iter().map(|&row| weight(row)).collect();
    let all_weights: Vec<f32> = every.iter().map(|&row| if few.contains(&row) { weight(row) } else { 0.0 }).collect();

    let (logp, narrow) = trained(model, &packed, (&few, &few_labels, &few_weights), dropout, recompute);
    let (all, whole) = trained(model, &packed, (&every, &labels, &all_weights), dropout, recompute);
    let read: Vec<f32> = few.iter().map(|&row| all[row as usize]).collect();
    assert_eq!(logp, read, "{what}: log-probabilities");
    if dropout.is_none() {
        let scored = model.log_probs(&packed, &few, &few_labels).unwrap().logp.to_vec1::<f32>().unwrap();
        assert_eq!(scored, logp, "{what}: scores");
    }
    for (index, (narrow, whole)) in narrow.iter().zip(&whole).enumerate() {
        let [narrow, whole] = [narrow, whole].map(|unit| unit.flat().to_vec1::<f32>().unwrap());
        let most = whole.iter().fold(0f32, |most, value| most.max(value.abs()));
        // What reaches the block before is the same to the bit. Weights of the last block and of the head are sums over 59 terms,
        // of which other ones are zero: each order is within 59 · 2^-24 of the sum of sizes, which 8 · the largest bounds here.
        let bound = if (1..model.spec().layers).contains(&index) { 0.0 } else { most * 59.0 * 8.0 / (1 << 24) as f32 };
        for (at, (narrow, whole)) in narrow.iter().zip(&whole).enumerate() {
            assert!((narrow - whole).abs() <= bound, "{what}: unit {index}, element {at}: {narrow} and {whole}");
        }
        // Beside adapters the ends have nothing to train.
        assert!(most > 0.0 || narrow.is_empty(), "{what}: unit {index} has a gradient");
    }
}

#[test]
fn rows_left_out_change_nothing() {
    for family in FAMILIES {
        for precision in [Precision::F32, Precision::Bf16] {
            for (dropout, recompute) in [(None, Recompute::Off), (Some(0.2), Recompute::On)] {
                let dropout = dropout.map(|probability| Dropout { probability, seed: 5, step: 3 });
                let what = format!("{family}, {precision:?}, {recompute:?}");
                agrees(&base(family).with_precision(precision).unwrap(), dropout, recompute, &what);
                let placement = Placement { precision, ..Placement::solo() };
                let base = base(family).place(&placement).unwrap();
                let model = with_adapters(base, &config(3, 0.1), &placement).unwrap();
                agrees(&model, dropout, recompute, &format!("{what}, adapters"));
            }
        }
    }
}
