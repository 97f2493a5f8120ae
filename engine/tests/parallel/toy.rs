//! Small models, and steps of training on random rows.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use tandem_collective::Collective;
use tandem_engine::model::spec::{Family, ModelSpec, NormKind, PositionKind};
use tandem_engine::model::unit::Head;
use tandem_engine::parallel::{Parallel, ParallelConfig, Placement, ZeroStage};
use tandem_engine::train::{OptimizerConfig, OptimizerKind, Schedule, ScheduleKind};
use tandem_engine::{Dropout, Engine, LogProbs, MicroBatch, Model, Packed, Precision, Recompute, Result, Train};
use tandem_kernels::mlp::Activation;
use tandem_kernels::rng::{Philox, Purpose};

pub(crate) const VOCABULARY: usize = 1100;

/// A gated model with rotary positions and grouped heads, or a plain one with biases and learned positions.
pub(crate) fn spec(gated: bool) -> ModelSpec {
    let rotary = PositionKind::Rotary { theta: 10_000.0, scaling: None };
    ModelSpec {
        family: if gated { Family::Llama } else { Family::Gpt2 },
        vocab_size: VOCABULARY,
        hidden: 48,
        layers: 4,
        heads: 8,
        kv_heads: if gated { 4 } else { 8 },
        head_dim: 6,
        mlp_width: 70,
        activation: if gated { Activation::Silu } else { Activation::GeluTanh },
        gated,
        norm: if gated { NormKind::Rms } else { NormKind::Layer },
        norm_eps: 1e-5,
        post_norm: false,
        positions: if gated { rotary } else { PositionKind::Learned { offset: 0 } },
        max_positions: 64,
        qkv_bias: !gated,
        output_bias: !gated,
        mlp_bias: !gated,
        window: None,
        tied: !gated,
        embedding_width: None,
        init_std: 0.05,
        dropout: 0.0,
    }
}

/// How a run is laid out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    pub(crate) world: usize,
    pub(crate) stage: ZeroStage,
    pub(crate) config: ParallelConfig,
    /// Micro-batches of a lane in a step.
    pub(crate) rounds: usize,
    pub(crate) recompute: Recompute,
    pub(crate) prefetch_units: usize,
    pub(crate) persistence_threshold: usize,
    pub(crate) precision: Precision,
}

impl Layout {
    pub(crate) fn of(world: usize, stage: ZeroStage, config: ParallelConfig) -> Self {
        let recompute = Recompute::Off;
        let precision = Precision::F32;
        Self { world, stage, config, rounds: 1, recompute, prefetch_units: 1, persistence_threshold: 0, precision }
    }

    pub(crate) fn placement(&self, world: &Arc<dyn Collective>) -> Result<Placement> {
        let parallel = Parallel::new(world, &self.config)?;
        Ok(Placement {
            precision: self.precision,
            prefetch_units: self.prefetch_units,
            persistence_threshold: self.persistence_threshold,
            reduce_bucket_bytes: 1 << 14,
            ..Placement::of(parallel, self.stage)
        })
    }
}

pub(crate) fn optimizer() -> OptimizerConfig {
    OptimizerConfig {
        kind: OptimizerKind::AdamW,
        schedule: Schedule {
            kind: ScheduleKind::Cosine,
            peak_lr: 1e-2,
            warmup_steps: 2,
            total_steps: 10,
            min_ratio: 0.1,
        },
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.01,
        max_grad_norm: 0.5,
    }
}

pub(crate) fn engine(spec: &ModelSpec, placement: &Placement) -> Result<Engine<Train>> {
    let model = Model::initial(spec.clone(), Head::Language, 7)?.place(placement)?;
    Engine::placed(model, optimizer(), placement.clone())
}

/// The rows of a step: sequences of unequal lengths.
pub(crate) fn rows(step: u64, count: usize) -> Vec<Vec<u32>> {
    let philox = Philox::new(11, Purpose::Init, step);
    let row = |index: usize| {
        let len = 3 + (philox.uniform(index as u64, 0, 1) * 20.0) as usize;
        (0..len).map(|at| (philox.uniform(index as u64, 1 + at as u32, 1) * VOCABULARY as f64) as u32).collect()
    };
    (0..count).map(row).collect()
}

fn micro_batch(rows: &[(usize, Vec<u32>)], step: u64) -> MicroBatch {
    let mut batch = Packed::new();
    let (mut targets, mut labels) = (Vec::new(), Vec::new());
    for (index, ids) in rows {
        let start = batch.tokens() as u32;
        batch.push(ids, *index as u64);
        targets.extend(start..start + ids.len() as u32 - 1);
        labels.extend_from_slice(&ids[1..]);
    }
    let dropout = Some(Dropout { probability: 0.1, seed: 5, step });
    MicroBatch { batch, rows: targets, labels, dropout }
}

/// The passes of this rank: round by round, its lanes in order. Rows go to lanes and rounds in order, the last ones to nobody,
/// so that some lanes have nothing.
pub(crate) fn passes(parallel: &Parallel, rows: &[Vec<u32>], rounds: usize, step: u64) -> Vec<Option<MicroBatch>> {
    let cells = parallel.data_lanes * rounds;
    let each = rows.len().div_ceil(cells);
    let numbered: Vec<(usize, Vec<u32>)> = rows.iter().cloned().enumerate().collect();
    let mut passes = Vec::new();
    for round in 0..rounds {
        for lane in parallel.lanes() {
            let cell = lane * rounds + round;
            let start = (cell * each).min(rows.len());
            let own = &numbered[start..(start + each).min(rows.len())];
            passes.push((!own.is_empty()).then(|| micro_batch(own, step)));
        }
    }
    passes
}

pub(crate) fn negative_sum(out: &LogProbs) -> Result<Tensor> {
    Ok(out.logp.to_dtype(DType::F64)?.sum_all()?.neg()?)
}

/// What a run has come to: the bits of all weights, the norm of the gradient in each step.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Trained {
    pub(crate) weights: Vec<u32>,
    pub(crate) norms: Vec<u64>,
}

/// Trains for `steps` steps on `rows_per_step` rows each.
pub(crate) fn train(engine: &mut Engine<Train>, layout: &Layout, steps: u64, rows_per_step: usize) -> Result<Vec<u64>> {
    let mut norms = Vec::new();
    for step in 0..steps {
        let rows = rows(step, rows_per_step);
        let passes = passes(engine.model().parallel(), &rows, layout.rounds, step);
        engine.accumulate_all_log_probs(&passes, layout.recompute, |_, out| negative_sum(out))?;
        let terms: usize = rows.iter().map(|row| row.len() - 1).sum();
        let outcome = engine.step(terms as f64)?;
        assert!(outcome.applied);
        norms.push(outcome.grad_norm.to_bits());
    }
    Ok(norms)
}

/// The bits of all weights in the whole layout; empty on all ranks but the first.
pub(crate) fn weight_bits(model: &Model) -> Result<Vec<u32>> {
    let mut bits = Vec::new();
    for index in 0..=model.spec().layers {
        if let Some(unit) = model.whole_unit(index)? {
            bits.extend(unit.flat().to_vec1::<f32>()?.into_iter().map(f32::to_bits));
        }
    }
    Ok(bits)
}
