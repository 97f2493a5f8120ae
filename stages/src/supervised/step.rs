//! One optimizer step.

use std::time::Instant;

use tandem_data::Sampler;
use tandem_engine::train::StepOutcome;
use tandem_engine::{Dropout, Engine, Recompute, Train};

use super::{Objective, Pass, Plan};
use crate::error::Result;
use crate::monitor::{MetricsRow, field};
use crate::ranks::Team;

/// The rows of a step that was left out, as far as they are listed.
const SKIPPED_ROWS: &str = "skipped_rows";
/// Most of them to list.
const ROWS_LISTED: usize = 8;

/// A training row at its place in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepRow {
    /// Passes over the data before this one.
    pub epoch: u64,
    /// The row's number.
    pub index: usize,
    /// Its place in the step, which addresses its dropout.
    pub place: u64,
}

/// What a step did.
#[derive(Debug)]
pub(super) struct Report {
    loss: f64,
    lr: f64,
    grad_norm: f64,
    seconds: f64,
    pub(super) tokens: usize,
    pub(super) applied: bool,
    /// Bytes that this rank sent to others for gradients, moments and weights.
    wire_bytes: u64,
}

/// The rows of the next step: at most `count`, fewer at the end of an epoch.
pub(super) fn next_rows(sampler: &mut Sampler, count: usize) -> Vec<StepRow> {
    let left = sampler.len() - sampler.cursor().position as usize;
    let left = if left == 0 { sampler.len() } else { left };
    let indices = sampler.next_batch(count.min(left));
    let epoch = sampler.cursor().epoch;
    indices.into_iter().zip(0..).map(|(index, place)| StepRow { epoch, index, place }).collect()
}

/// Makes step `number` on `rows`.
pub(super) fn step(
    engine: &mut Engine<Train>,
    team: &Team,
    objective: &dyn Objective,
    rows: &[StepRow],
    number: u64,
    plan: &Plan<'_>,
) -> Result<Report> {
    let start = Instant::now();
    let probability = plan.training.dropout as f32;
    let pass = Pass {
        dropout: (probability > 0.0).then_some(Dropout { probability, seed: plan.seed, step: number }),
        recompute: if plan.training.recompute { Recompute::On } else { Recompute::Off },
    };
    let lengths: Vec<usize> = rows.iter().map(|&row| objective.tokens(row)).collect();
    let share = team.share(&lengths, plan.training.tokens_per_micro_batch)?;
    let of_pass = |at: &Option<Vec<usize>>| at.as_ref().map(|at| at.iter().map(|&at| rows[at]).collect::<Vec<_>>());
    let passes: Vec<_> = share.passes.iter().map(|(_, at)| of_pass(at)).collect();
    let sums = objective.accumulate(engine, &passes, pass)?;
    let known = share.passes.iter().zip(sums).filter_map(|((number, _), sum)| Some((*number, [sum?])));
    let found = team.gather(&known.collect::<Vec<_>>(), share.all)?;
    let loss = found.into_iter().flatten().fold(0.0, |loss, [sum]| loss + sum);
    let terms = rows.iter().map(|&row| objective.terms(row)).sum::<usize>() as f64;
    let StepOutcome { lr, grad_norm, applied, wire_bytes } = if loss.is_finite() {
        engine.step(terms)?
    } else {
        let grad_norm = engine.grad_norm(terms)?;
        engine.clear_grads()?;
        let lr = engine.optimizer().config().schedule.lr(engine.optimizer().step() + 1);
        StepOutcome { lr, grad_norm, applied: false, wire_bytes: 0 }
    };
    let seconds = start.elapsed().as_secs_f64();
    Ok(Report { loss: loss / terms, lr, grad_norm, seconds, tokens: lengths.iter().sum(), applied, wire_bytes })
}

impl Report {
    /// The row of `metrics.jsonl`. A step that was left out names its rows.
    pub(super) fn metrics(&self, step: u64, objective: &dyn Objective, rows: &[StepRow]) -> MetricsRow {
        let mut row = MetricsRow::new(step);
        row.set(field::LOSS, self.loss)
            .set(field::LR, self.lr)
            .set(field::GRAD_NORM, self.grad_norm)
            .set(field::TOKENS, self.tokens)
            .set(field::TOKENS_PER_S, self.tokens as f64 / self.seconds)
            .set(field::TIME_TRAIN_S, self.seconds);
        if self.wire_bytes > 0 {
            row.set(field::WIRE_BYTES, self.wire_bytes);
        }
        if !self.applied {
            let listed: Vec<String> = rows.iter().take(ROWS_LISTED).map(|&row| objective.origin(row)).collect();
            row.set(SKIPPED_ROWS, listed);
        }
        row
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_never_spans_two_epochs() {
        let mut sampler = Sampler::new(5, 1).unwrap();
        let steps: Vec<Vec<StepRow>> = (0..6).map(|_| next_rows(&mut sampler, 2)).collect();
        assert_eq!(steps.iter().map(Vec::len).collect::<Vec<_>>(), [2, 2, 1, 2, 2, 1]);
        for (epoch, steps) in (0..).zip(steps.chunks(3)) {
            let rows: Vec<StepRow> = steps.concat();
            assert!(rows.iter().all(|row| row.epoch == epoch));
            let mut indices: Vec<usize> = rows.iter().map(|row| row.index).collect();
            indices.sort_unstable();
            assert_eq!(indices, [0, 1, 2, 3, 4]);
        }
    }
}
