//! How much of a model's units one rank computes with: tensor and pipeline cuts, and adapters.

use tandem_engine::model::spec::ModelSpec;
use tandem_engine::model::unit::{self, Head, ParamSlot, Shard, UnitId, UnitLayout};

use tandem_engine::parallel::Mesh;
use tandem_kernels::gemm::PackedMatrix;

use crate::config::LoraConfig;

/// Elements of the units of the rank with most: the ends, and some equal blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Units {
    /// Elements of the ends; the first and the last stage of a pipeline hold them.
    pub(super) ends: u64,
    /// Elements of a block.
    pub(super) block: u64,
    /// Blocks.
    pub(super) blocks: u64,
}

impl Units {
    /// The units of a model cut by `tensor` and `pipeline` ranks.
    pub(super) fn of(spec: &ModelSpec, head: Head, tensor: usize, pipeline: usize) -> Self {
        let elements = |id| elements(&UnitLayout::of(spec, head, id), spec, tensor.max(1));
        Self {
            ends: elements(UnitId::Ends),
            block: elements(UnitId::Block(0)),
            blocks: spec.layers.div_ceil(pipeline.max(1)) as u64,
        }
    }

    /// The adapters on these units: per linear map `rank · (inputs + outputs)`.
    pub(super) fn of_adapters(spec: &ModelSpec, lora: &LoraConfig, mesh: Mesh) -> Self {
        let (rank, tensor) = (lora.rank as u64, mesh.tensor.max(1) as u64);
        let is_target = |names: &[&str]| {
            lora.targets.is_empty() || lora.targets.iter().any(|target| names.contains(&target.as_str()))
        };
        let (d, f) = (spec.hidden as u64, spec.mlp_width as u64);
        let (queries, keys) = ((spec.heads * spec.head_dim) as u64, (spec.kv_heads * spec.head_dim) as u64);
        // Outputs are cut in all maps but the two that lead back into the residual stream, whose inputs are.
        let outward = |outputs: u64| rank * (d + outputs.div_ceil(tensor));
        let inward = |inputs: u64| rank * (inputs.div_ceil(tensor) + d);
        let mut block = 0;
        let mut add = |names: &[&str], elements: u64| block += if is_target(names) { elements } else { 0 };
        if is_target(&["c_attn"]) && !lora.targets.is_empty() {
            add(&["c_attn"], outward(queries + 2 * keys));
        } else {
            add(&["q_proj"], outward(queries));
            add(&["k_proj"], outward(keys));
            add(&["v_proj"], outward(keys));
        }
        add(&["o_proj", "out_proj", "c_proj"], inward(queries));
        if spec.gated {
            add(&["gate_proj"], outward(f));
        }
        add(&["up_proj", "fc1", "c_fc"], outward(f));
        add(&["down_proj", "fc2", "c_proj"], inward(f));
        Self { ends: 0, block, blocks: spec.layers.div_ceil(mesh.pipeline.max(1)) as u64 }
    }

    /// Elements in all.
    pub(super) fn total(&self) -> u64 {
        self.ends + self.blocks * self.block
    }

    /// Elements of one of `ranks` equal slices; each unit is sliced by itself and padded for it.
    pub(super) fn slice(&self, ranks: usize) -> u64 {
        let ranks = ranks.max(1) as u64;
        self.ends.div_ceil(ranks) + self.blocks * self.block.div_ceil(ranks)
    }

    /// Elements of the largest unit.
    pub(super) fn largest(&self) -> u64 {
        self.ends.max(self.block)
    }

    /// These units apart: those of more than `threshold` elements, and the others, which are never released.
    pub(super) fn persistent(self, threshold: usize) -> (Self, Self) {
        let threshold = threshold as u64;
        let keep = |is_small: bool| Self {
            ends: if (self.ends <= threshold) == is_small { self.ends } else { 0 },
            block: if (self.block <= threshold) == is_small { self.block } else { 0 },
            blocks: self.blocks,
        };
        (keep(false), keep(true))
    }
}

/// Bytes of the units of a model that is not trained, cut as in [`Units::of`]: the linear maps of blocks in 8 bits, all else in
/// bf16.
pub(super) fn int8_bytes(spec: &ModelSpec, head: Head, tensor: usize, pipeline: usize) -> u64 {
    const BF16: u64 = 2;
    let (units, tensor) = (Units::of(spec, head, tensor, pipeline), tensor.max(1));
    let bytes = |slot: &ParamSlot| match (slot.shape.as_slice(), slot.shard) {
        (&[n, k], Shard::Replicated) => PackedMatrix::int8_bytes(n, k) as u64,
        (&[n, k], Shard::Columns) => PackedMatrix::int8_bytes(n, k.div_ceil(tensor)) as u64,
        (&[_, k], Shard::Rows) => PackedMatrix::int8_bytes(rows(slot, spec, tensor), k) as u64,
        _ => BF16 * slot_elements(slot, spec, tensor),
    };
    let block: u64 = UnitLayout::of(spec, head, UnitId::Block(0)).params.iter().map(bytes).sum();
    BF16 * units.ends + units.blocks * block
}

/// Elements of a unit on one of `tensor` ranks.
fn elements(layout: &UnitLayout, spec: &ModelSpec, tensor: usize) -> u64 {
    layout.params.iter().map(|slot| slot_elements(slot, spec, tensor)).sum()
}

fn slot_elements(slot: &ParamSlot, spec: &ModelSpec, tensor: usize) -> u64 {
    let rest: usize = slot.shape.iter().skip(1).product();
    let elements = match slot.shard {
        Shard::Replicated => slot.len(),
        Shard::Columns => slot.shape[0] * rest.div_ceil(tensor),
        Shard::Rows => rows(slot, spec, tensor) * rest,
    };
    elements as u64
}

/// Rows on one rank; fused projections are cut one by one, and heads stay whole.
fn rows(slot: &ParamSlot, spec: &ModelSpec, tensor: usize) -> usize {
    match slot.name {
        unit::QKV | unit::QKV_BIAS => {
            (spec.heads.div_ceil(tensor) + 2 * spec.kv_heads.div_ceil(tensor)) * spec.head_dim
        }
        unit::UP | unit::UP_BIAS if spec.gated => 2 * spec.mlp_width.div_ceil(tensor),
        _ => slot.shape[0].div_ceil(tensor),
    }
}
