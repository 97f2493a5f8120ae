//! The order in which a rank runs forwards and backwards: one forward, one backward.
//!
//! A stage runs as many forwards ahead as there are stages after it, then a backward after each forward (1F1B; Narayanan et
//! al., 2019, "PipeDream", section 3.2, without its weight versions: Fan et al., 2021, "DAPPLE"). With one stage a backward
//! follows each forward.

use std::collections::VecDeque;

use crate::Result;
use crate::batch::MicroBatch;
use crate::model::{Model, Recompute, Trace};
use crate::parallel::Gradients;

/// Runs all `passes`; `backward` gets the number of a pass, its forward and its rows.
pub(crate) fn run<T>(
    model: &Model,
    grads: &mut Gradients,
    passes: &[Option<MicroBatch>],
    recompute: Recompute,
    mut backward: impl FnMut(usize, Trace<'_>, &MicroBatch, &mut Gradients) -> Result<Option<T>>,
) -> Result<Vec<Option<T>>> {
    let parallel = model.parallel();
    let ahead = parallel.mesh.pipeline - 1 - parallel.at.pipeline;
    let mut live: VecDeque<(usize, Option<Trace<'_>>)> = VecDeque::new();
    let mut results: Vec<Option<T>> = passes.iter().map(|_| None).collect();
    let mut finish = |(pass, trace): (usize, Option<Trace<'_>>)| -> Result<()> {
        match (trace, &passes[pass]) {
            (Some(trace), Some(micro_batch)) => results[pass] = backward(pass, trace, micro_batch, grads)?,
            _ => model.join_backward(grads)?,
        }
        Ok(())
    };
    for (pass, micro_batch) in passes.iter().enumerate() {
        let trace = match micro_batch {
            Some(micro_batch) => {
                Some(model.trace(&micro_batch.batch, &micro_batch.rows, micro_batch.dropout, recompute)?)
            }
            None => {
                model.join_forward()?;
                None
            }
        };
        live.push_back((pass, trace));
        if live.len() > ahead
            && let Some(oldest) = live.pop_front()
        {
            finish(oldest)?;
        }
    }
    live.into_iter().try_for_each(finish)?;
    Ok(results)
}
