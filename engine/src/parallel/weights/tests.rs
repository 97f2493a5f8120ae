//! What was gathered ahead must not outlive the weights that it is a copy of.

use std::path::Path;
use std::time::Duration;

use serde_json::json;
use tandem_collective::{Tag, Threads};

use super::*;
use crate::model::families::read_spec;
use crate::model::unit::Head;
use crate::parallel::{Parallel, ParallelConfig};

/// Layouts of a model of two blocks.
pub(in crate::parallel) fn layouts() -> Vec<Arc<UnitLayout>> {
    let config = json!({
        "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 16,
        "intermediate_size": 8, "max_position_embeddings": 8, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    });
    let spec = read_spec(Path::new("config.json"), &config).unwrap();
    UnitLayout::all(&spec, Head::Language).into_iter().map(Arc::new).collect()
}

#[test]
fn weights_do_not_change_under_a_gather_that_nobody_has_fetched() {
    for precision in [Precision::F32, Precision::Bf16] {
        std::thread::scope(|scope| {
            for rank in Threads::world(2, Duration::from_secs(20)) {
                scope.spawn(move || {
                    let layouts = layouts();
                    let parallel = Parallel::new(&rank, &ParallelConfig::default()).unwrap();
                    let at = parallel.data.rank();
                    let placement = Placement { precision, ..Placement::of(parallel, ZeroStage::Three) };
                    let weights = Weights::place(&placement, &layouts, UnitBuffer::zeros).unwrap();
                    let change = |unit: usize| {
                        weights.change(unit, slicing(&layouts[unit], &placement), at, |values| values.fill(1.0))
                    };
                    // A pass that fetches the first block and fails before the second, which is on its way already.
                    drop(weights.fetch(1, 1, [2]).unwrap());
                    assert!(matches!(change(2), Err(Error::WeightsInUse)), "{precision:?}");
                    // One that takes both leaves them free.
                    drop(weights.fetch(2, 1, []).unwrap());
                    // As the norm of the gradient does in a step: nobody reads any more.
                    rank.barrier(Tag::new("all have read", 0)).unwrap();
                    change(2).unwrap();
                    rank.barrier(Tag::new("all have changed", 0)).unwrap();
                    let fetched = weights.fetch(2, 1, []).unwrap();
                    let whole = fetched.widened().unwrap();
                    assert!(with_slice(whole.flat(), |values| values.iter().all(|&value| value == 1.0)).unwrap());
                });
            }
        });
    }
}
