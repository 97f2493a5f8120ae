//! A small model that learns which token follows which, and steps of training it.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use tandem_collective::Collective;
use tandem_engine::model::spec::{Family, ModelSpec, NormKind, PositionKind};
use tandem_engine::model::unit::Head;
use tandem_engine::parallel::{Parallel, ParallelConfig, Placement, ZeroStage};
use tandem_engine::train::{OptimizerConfig, OptimizerKind, Schedule, ScheduleKind, StepOutcome};
use tandem_engine::{Engine, LogProbs, MicroBatch, Model, Packed, Recompute, Result, Train};
use tandem_kernels::mlp::Activation;
use tandem_kernels::rng::{Philox, Purpose};

pub(crate) const VOCABULARY: usize = 40;
/// No row is longer, so what comes later among the learned positions never has a gradient.
pub(crate) const LONGEST_ROW: usize = 20;
pub(crate) const ROWS: usize = 16;

pub(crate) const ONE_BIT: OptimizerKind = OptimizerKind::OneBitAdam { freeze_steps: 6 };
pub(crate) const ZERO_ONE: OptimizerKind = OptimizerKind::ZeroOneAdam {
    freeze_steps: 9,
    variance_updates_per_interval: 3,
    steps_per_local_interval: 4,
    max_local_steps: 3,
};
pub(crate) const VOTES: OptimizerKind = OptimizerKind::SignSgd { error_feedback: false };
pub(crate) const VOTES_WITH_FEEDBACK: OptimizerKind = OptimizerKind::SignSgd { error_feedback: true };
pub(crate) const KINDS: [OptimizerKind; 4] = [ONE_BIT, ZERO_ONE, VOTES, VOTES_WITH_FEEDBACK];

pub(crate) fn spec() -> ModelSpec {
    ModelSpec {
        family: Family::Gpt2,
        vocab_size: VOCABULARY,
        hidden: 24,
        layers: 2,
        heads: 3,
        kv_heads: 3,
        head_dim: 8,
        mlp_width: 50,
        activation: Activation::GeluTanh,
        gated: false,
        norm: NormKind::Layer,
        norm_eps: 1e-5,
        post_norm: false,
        positions: PositionKind::Learned { offset: 0 },
        max_positions: 64,
        qkv_bias: true,
        output_bias: true,
        mlp_bias: true,
        window: None,
        tied: true,
        embedding_width: None,
        init_std: 0.05,
        dropout: 0.0,
    }
}

pub(crate) fn config(kind: OptimizerKind, peak_lr: f64, total_steps: u64) -> OptimizerConfig {
    let schedule = Schedule { kind: ScheduleKind::Cosine, peak_lr, warmup_steps: 2, total_steps, min_ratio: 0.0 };
    OptimizerConfig { kind, schedule, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.01, max_grad_norm: 1.0 }
}

pub(crate) fn placement(world: &Arc<dyn Collective>, stage: ZeroStage, lanes: usize) -> Placement {
    let config = ParallelConfig { data_lanes: lanes * world.world(), ..ParallelConfig::default() };
    Placement::of(Parallel::new(world, &config).unwrap(), stage)
}

pub(crate) fn engine(config: OptimizerConfig, placement: &Placement) -> Result<Engine<Train>> {
    let model = Model::initial(spec(), Head::Language, 7)?.place(placement)?;
    Engine::placed(model, config, placement.clone())
}

/// Rows of unequal lengths in which each token but the first is a function of the one before.
pub(crate) fn rows(step: u64) -> Vec<Vec<u32>> {
    let philox = Philox::new(11, Purpose::Init, step);
    let row = |index: usize| {
        let uniform = |at| philox.uniform(index as u64, at, 1);
        let len = 4 + (uniform(0) * (LONGEST_ROW - 3) as f64) as usize;
        let mut token = (uniform(1) * VOCABULARY as f64) as u32;
        let mut next = || {
            let now = token;
            token = (7 * now + 3) % VOCABULARY as u32;
            now
        };
        (0..len).map(|_| next()).collect()
    };
    (0..ROWS).map(row).collect()
}

fn micro_batch(rows: &[Vec<u32>]) -> MicroBatch {
    let mut batch = Packed::new();
    let (mut targets, mut labels) = (Vec::new(), Vec::new());
    for (index, ids) in rows.iter().enumerate() {
        let start = batch.tokens() as u32;
        batch.push(ids, index as u64);
        targets.extend(start..start + ids.len() as u32 - 1);
        labels.extend_from_slice(&ids[1..]);
    }
    MicroBatch { batch, rows: targets, labels, dropout: None }
}

/// Terms of the loss of a step.
pub(crate) fn terms(step: u64) -> f64 {
    rows(step).iter().map(|row| row.len() - 1).sum::<usize>() as f64
}

/// Accumulates the gradient of step `step`, in two rounds, and returns this rank's sum of the loss, times `factor`.
pub(crate) fn accumulate(engine: &mut Engine<Train>, step: u64, factor: f64) -> Result<f64> {
    let (rows, rounds) = (rows(step), 2);
    let parallel = engine.model().parallel().clone();
    let each = ROWS / parallel.data_lanes / rounds;
    assert!(each > 0, "the toy has too few rows for {} lanes", parallel.data_lanes);
    let mut passes = Vec::new();
    for round in 0..rounds {
        for lane in parallel.lanes() {
            let start = (lane * rounds + round) * each;
            passes.push(Some(micro_batch(&rows[start..start + each])));
        }
    }
    let loss = |_: usize, out: &LogProbs| -> Result<Tensor> {
        Ok((out.logp.to_dtype(DType::F64)?.sum_all()?.neg()? * factor)?)
    };
    let losses = engine.accumulate_all_log_probs(&passes, Recompute::Off, loss)?;
    Ok(losses.into_iter().flatten().map(|(loss, _)| loss).sum())
}

/// One step; the step's number counts from 1. Returns this rank's sum of the loss, too.
pub(crate) fn step(engine: &mut Engine<Train>) -> Result<(f64, StepOutcome)> {
    let step = engine.optimizer().step() + 1;
    let loss = accumulate(engine, step, 1.0)?;
    let outcome = engine.step(terms(step))?;
    assert!(outcome.applied, "step {step} has the gradient norm {}", outcome.grad_norm);
    Ok((loss, outcome))
}

/// This rank's weights by unit; whole, for the stages of these tests keep them so.
pub(crate) fn weights(engine: &Engine<Train>) -> Vec<Vec<f32>> {
    engine.model().units().unwrap().iter().map(|unit| unit.flat().to_vec1().unwrap()).collect()
}

/// The gradient that this rank has accumulated, by unit.
pub(crate) fn gradient(engine: &Engine<Train>) -> Vec<Vec<f32>> {
    let units = 0..engine.model().layouts().len();
    units.map(|unit| engine.grads().with_slice(unit, <[f32]>::to_vec).unwrap()).collect()
}

pub(crate) fn bits(values: &[Vec<f32>]) -> Vec<u32> {
    values.iter().flatten().map(|value| value.to_bits()).collect()
}
