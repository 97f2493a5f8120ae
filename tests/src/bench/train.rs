//! Steps of supervised fine-tuning and of reward modelling.

use std::sync::Arc;
use std::time::Duration;

use candle_core::Tensor;
use tandem_collective::{Collective, Solo, Threads};
use tandem_data::packing::{Packing, pack_by_tokens};
use tandem_engine::model::unit::Head;
use tandem_engine::parallel::{Parallel, ParallelConfig, Placement, ZeroStage};
use tandem_engine::train::{OptimizerConfig, OptimizerKind, Schedule, ScheduleKind};
use tandem_engine::{Engine, MicroBatch, Model, Packed, Recompute};
use tandem_stages::error::StageError;
use tandem_stages::ranks::on_threads;

use super::case::{Case, Work};
use super::{BenchError, Measured, lengths, peak_mib, timed, tokens};

/// The optimizer of every measurement: AdamW, clipped, at a rate that changes little.
pub(super) fn optimizer() -> OptimizerConfig {
    let kind = ScheduleKind::Constant;
    OptimizerConfig {
        kind: OptimizerKind::AdamW,
        schedule: Schedule { kind, peak_lr: 1e-4, warmup_steps: 0, total_steps: 1, min_ratio: 1.0 },
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.0,
        max_grad_norm: 1.0,
    }
}

pub(super) fn recompute(case: &Case) -> Recompute {
    if case.recompute { Recompute::On } else { Recompute::Off }
}

/// Sequences of a step, packed into passes: for each, its sequences' numbers.
struct Step {
    sequences: Vec<Vec<u32>>,
    passes: Vec<Vec<usize>>,
}

/// The whole step, cut into as many parts as there are ranks; pairs stay together.
fn step_of(case: &Case) -> Result<Step, BenchError> {
    let (count, length) = case.shape.training_work();
    let vocabulary = case.shape.spec().vocab_size;
    let (lengths, together) = match case.work {
        Work::Reward => (lengths(1, count, length / 2, length), 2),
        _ => (vec![length; count], 1),
    };
    let sequences =
        lengths.iter().enumerate().map(|(index, &length)| tokens(index as u64, length, vocabulary)).collect();
    let groups: Vec<usize> = lengths.chunks(together).map(|group| group.iter().sum()).collect();
    let budget = case.tokens_per_micro_batch.min(groups.iter().sum::<usize>().div_ceil(case.ranks));
    let passes = pack_by_tokens(&groups, budget, usize::MAX, Packing::InOrder)?;
    let members =
        |groups: Vec<usize>| groups.iter().flat_map(|group| group * together..(group + 1) * together).collect();
    Ok(Step { sequences, passes: passes.into_iter().map(members).collect() })
}

impl Step {
    /// The passes of one rank of several; all ranks have equally many.
    fn of_rank(&self, rank: usize, ranks: usize, work: Work) -> Vec<Option<MicroBatch>> {
        let rounds = self.passes.len().div_ceil(ranks);
        let pass = |round: usize| self.passes.get(round * ranks + rank).map(|members| self.micro_batch(members, work));
        (0..rounds).map(pass).collect()
    }

    fn micro_batch(&self, members: &[usize], work: Work) -> MicroBatch {
        let batch = Packed::from_sequences(members.iter().map(|&index| &self.sequences[index]));
        let (mut rows, mut labels) = (Vec::new(), Vec::new());
        for sequence in 0..batch.sequences() {
            let range = batch.rows(sequence);
            if work == Work::Reward {
                rows.push(range.end as u32 - 1);
                continue;
            }
            rows.extend(range.start as u32..range.end as u32 - 1);
            labels.extend_from_slice(&batch.ids[range.start + 1..range.end]);
        }
        MicroBatch { batch, rows, labels, dropout: None }
    }
}

/// `Σ log(1 + exp(rejected − chosen))` over pairs of scores that lie side by side (Ouyang et al., 2022, equation 1).
fn pairwise(scores: &Tensor) -> tandem_engine::Result<Tensor> {
    let pairs = scores.reshape(((), 2))?;
    let margin = (pairs.narrow(1, 0, 1)? - pairs.narrow(1, 1, 1)?)?;
    Ok((margin.neg()?.exp()? + 1.0)?.log()?.sum_all()?)
}

pub(super) fn run(case: &Case) -> Result<Measured, BenchError> {
    let worlds: Vec<Arc<dyn Collective>> = match case.ranks {
        1 => vec![Arc::new(Solo::new())],
        ranks => Threads::world(ranks, Duration::from_secs(600)),
    };
    let stage = match case.zero_stage {
        0 => ZeroStage::Zero,
        1 => ZeroStage::One,
        2 => ZeroStage::Two,
        3 => ZeroStage::Three,
        other => return Err(format!("there is no ZeRO stage {other}").into()),
    };
    let step = step_of(case)?;
    let seconds =
        on_threads(worlds, Some(case.threads()), |world| rank(case, &step, world, stage).map_err(StageError::bug))?;
    let tokens = step.sequences.iter().map(Vec::len).sum();
    // Ranks end a step together.
    Ok(Measured {
        seconds: seconds.into_iter().next().unwrap_or_default(),
        tokens,
        peak_mib: peak_mib(),
        phases: Vec::new(),
    })
}

fn rank(case: &Case, step: &Step, world: Arc<dyn Collective>, stage: ZeroStage) -> Result<Vec<f64>, BenchError> {
    let parallel = Parallel::new(&world, &ParallelConfig::default())?;
    let placement = case.placed(Placement::of(parallel, stage));
    let head = if case.work == Work::Reward { Head::Scalar } else { Head::Language };
    let model = Model::initial(case.shape.spec(), head, 1234)?.place(&placement)?;
    let mut engine = Engine::placed(model, optimizer(), placement)?;
    timed(case.warmup, case.steps, |_| {
        let passes = step.of_rank(world.rank(), case.ranks, case.work);
        let terms = match case.work {
            Work::Reward => step.sequences.len() / 2,
            _ => step.sequences.iter().map(|sequence| sequence.len() - 1).sum(),
        };
        if case.work == Work::Reward {
            engine.accumulate_all_scores(&passes, recompute(case), |_, scores| pairwise(scores))?;
        } else {
            engine.accumulate_all_nll(&passes, recompute(case))?;
        }
        match engine.step(terms as f64)?.applied {
            true => Ok(()),
            false => Err("the gradient is not finite".into()),
        }
    })
}
