//! The negative log-likelihood and its gradient at once: bit for bit those of the same loss as a function of log-probabilities.

#[path = "lora/adapted.rs"]
#[allow(dead_code, unreachable_pub)]
mod adapted;

use adapted::{FAMILIES, adapted as with_adapters, base, batch, config};
use tandem_engine::parallel::{Gradients, Placement};
use tandem_engine::{LogProbs, Model, Precision, Recompute};

/// Few rows, and so many that the head keeps their logits.
const LENGTHS: [&[usize]; 2] = [&[9, 2, 30], &[41, 40, 39, 38, 42, 40, 41, 3, 40]];

/// Loss, log-probabilities, entropies and gradients of all trained units: at once, or of a loss that could be any.
fn trained(model: &Model, lengths: &[usize], at_once: bool) -> (f64, Vec<f32>, Vec<f32>, Vec<Vec<f32>>) {
    let (packed, rows, labels) = batch(model.spec().vocab_size, lengths);
    let mut grads = Gradients::new(&Placement::solo(), &model.trained_layouts()).unwrap();
    let trace = model.trace(&packed, &rows, None, Recompute::Off).unwrap();
    let loss = |out: &LogProbs| Ok(out.logp.sum_all()?.neg()?);
    let result = if at_once {
        trace.backward_nll(&labels, &mut grads)
    } else {
        trace.backward_log_probs(&labels, &mut grads, loss)
    };
    let (value, out) = result.unwrap().unwrap();
    let units = grads.in_place().unwrap().unwrap();
    let gradients = units.iter().map(|unit| unit.flat().to_vec1().unwrap()).collect();
    (value, out.logp.to_vec1().unwrap(), out.entropy.to_vec1().unwrap(), gradients)
}

#[test]
fn at_once_is_the_loss_that_it_says() {
    for (family, precision) in FAMILIES.into_iter().flat_map(|of| [Precision::F32, Precision::Bf16].map(|p| (of, p))) {
        let placement = Placement { precision, ..Placement::solo() };
        let plain = base(family).with_precision(precision).unwrap();
        let adapted = with_adapters(base(family).place(&placement).unwrap(), &config(3, 0.0), &placement).unwrap();
        for (model, lengths) in [&plain, &adapted].into_iter().flat_map(|model| LENGTHS.map(|lengths| (model, lengths)))
        {
            let once = trained(model, lengths, true);
            assert!(once.0 > 0.0 && once.3.iter().flatten().any(|&value| value != 0.0));
            assert!(once == trained(model, lengths, false), "{family}, {precision:?}, {} sequences", lengths.len());
        }
    }
}
