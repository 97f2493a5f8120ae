//! The unit: the atom that is stored, gathered, recomputed, cut and re-sharded as one.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use tandem_kernels::rng::{Philox, Purpose};

use super::spec::{ModelSpec, NormKind};
use crate::{Error, Result};

/// Which unit of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum UnitId {
    /// Embedding, final norm and head.
    Ends,
    /// A transformer block, counted from 0.
    Block(usize),
}

impl std::fmt::Display for UnitId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            UnitId::Ends => f.write_str("ends"),
            UnitId::Block(index) => write!(f, "block.{index}"),
        }
    }
}

/// What a model computes from its last hidden rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// Log-probabilities over the vocabulary.
    Language,
    /// One number (reward models and critics).
    Scalar,
}

/// How a parameter starts when a model is made from nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// All zeros.
    Zeros,
    /// All ones.
    Ones,
    /// Normal with this standard deviation.
    Normal(f64),
}

/// How tensor parallelism may cut a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shard {
    /// Every rank holds all of it.
    Replicated,
    /// Cut along the outputs; `parts` fused projections are cut one by one.
    Rows,
    /// Cut along the inputs.
    Columns,
}

/// One parameter inside a unit's flat buffer.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamSlot {
    /// Name inside the unit.
    pub name: &'static str,
    /// Shape, outputs first.
    pub shape: Vec<usize>,
    /// First element in the flat buffer.
    pub offset: usize,
    /// Start value.
    pub init: Init,
    /// How tensor parallelism may cut it.
    pub shard: Shard,
    /// Whether weight decay applies: to matrices, not to norms and biases.
    pub decay: bool,
}

impl ParamSlot {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The parameters of one unit and where they lie in its flat buffer.
#[derive(Clone, Debug, PartialEq)]
pub struct UnitLayout {
    /// Which unit.
    pub id: UnitId,
    /// Its parameters, back to back.
    pub params: Vec<ParamSlot>,
}

impl UnitLayout {
    /// Layout of the unit `id` of a model.
    pub fn of(spec: &ModelSpec, head: Head, id: UnitId) -> Self {
        match id {
            UnitId::Ends => Self::ends(spec, head),
            UnitId::Block(index) => Self::block(spec, index),
        }
    }

    /// Layouts of all units of a model: the ends, then the blocks.
    pub fn all(spec: &ModelSpec, head: Head) -> Vec<Self> {
        std::iter::once(UnitId::Ends)
            .chain((0..spec.layers).map(UnitId::Block))
            .map(|id| Self::of(spec, head, id))
            .collect()
    }

    /// Elements of the flat buffer.
    pub fn len(&self) -> usize {
        self.params.last().map_or(0, |slot| slot.offset + slot.len())
    }

    /// Whether the unit has no parameter.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The slot called `name`.
    pub fn slot(&self, name: &str) -> Option<&ParamSlot> {
        self.params.iter().find(|slot| slot.name == name)
    }

    /// Runs of neighbouring parameters with the same decay: (first element, elements, decay).
    pub fn decay_ranges(&self) -> Vec<(usize, usize, bool)> {
        let mut ranges: Vec<(usize, usize, bool)> = Vec::new();
        for slot in &self.params {
            match ranges.last_mut() {
                Some((_, len, decay)) if *decay == slot.decay => *len += slot.len(),
                _ => ranges.push((slot.offset, slot.len(), slot.decay)),
            }
        }
        ranges
    }

    fn push(&mut self, name: &'static str, shape: &[usize], init: Init, shard: Shard) {
        let offset = self.len();
        self.params.push(ParamSlot { name, shape: shape.to_vec(), offset, init, shard, decay: shape.len() > 1 });
    }

    fn push_norm(&mut self, spec: &ModelSpec, weight: &'static str, bias: &'static str) {
        self.push(weight, &[spec.hidden], Init::Ones, Shard::Replicated);
        if spec.norm == NormKind::Layer {
            self.push(bias, &[spec.hidden], Init::Zeros, Shard::Replicated);
        }
    }

    fn block(spec: &ModelSpec, index: usize) -> Self {
        let mut unit = Self { id: UnitId::Block(index), params: Vec::new() };
        let (d, f) = (spec.hidden, spec.mlp_width);
        let attended = spec.heads * spec.head_dim;
        let inner = Init::Normal(spec.init_std);
        // Outputs into the residual stream start smaller, so that its variance does not grow with depth (GPT-2).
        let residual = Init::Normal(spec.init_std / (2.0 * spec.layers as f64).sqrt());
        unit.push(QKV, &[spec.qkv_width(), d], inner, Shard::Rows);
        unit.push(OUTPUT, &[d, attended], residual, Shard::Columns);
        unit.push(UP, &[spec.up_width(), d], inner, Shard::Rows);
        unit.push(DOWN, &[d, f], residual, Shard::Columns);
        unit.push_norm(spec, NORM1, NORM1_BIAS);
        unit.push_norm(spec, NORM2, NORM2_BIAS);
        if spec.qkv_bias {
            unit.push(QKV_BIAS, &[spec.qkv_width()], Init::Zeros, Shard::Rows);
        }
        if spec.output_bias {
            unit.push(OUTPUT_BIAS, &[d], Init::Zeros, Shard::Replicated);
        }
        if spec.mlp_bias {
            unit.push(UP_BIAS, &[spec.up_width()], Init::Zeros, Shard::Rows);
            unit.push(DOWN_BIAS, &[d], Init::Zeros, Shard::Replicated);
        }
        unit
    }

    fn ends(spec: &ModelSpec, head: Head) -> Self {
        let mut unit = Self { id: UnitId::Ends, params: Vec::new() };
        let (d, e) = (spec.hidden, spec.embedding_width());
        let normal = Init::Normal(spec.init_std);
        unit.push(EMBEDDING, &[spec.vocab_size, e], normal, Shard::Rows);
        if let Some(rows) = spec.position_rows() {
            unit.push(POSITIONS, &[rows, d], normal, Shard::Replicated);
        }
        if e != d {
            unit.push(PROJECT_IN, &[d, e], normal, Shard::Replicated);
            unit.push(PROJECT_OUT, &[e, d], normal, Shard::Replicated);
        }
        match head {
            Head::Language if !spec.tied => unit.push(HEAD, &[spec.vocab_size, e], normal, Shard::Rows),
            Head::Language => {}
            // A critic that starts at zero says nothing until it has learnt something.
            Head::Scalar => unit.push(SCORE, &[1, e], Init::Zeros, Shard::Replicated),
        }
        if spec.final_norm() {
            unit.push_norm(spec, FINAL_NORM, FINAL_NORM_BIAS);
        }
        unit
    }
}

/// Fused q, k, v projection, `[(H + 2K) D, d]`.
pub const QKV: &str = "qkv.weight";
/// Its bias.
pub const QKV_BIAS: &str = "qkv.bias";
/// Output projection of the attention, `[d, H D]`.
pub const OUTPUT: &str = "output.weight";
/// Its bias.
pub const OUTPUT_BIAS: &str = "output.bias";
/// First MLP projection, `[2f, d]` (gate, then up) or `[f, d]`.
pub const UP: &str = "up.weight";
/// Its bias.
pub const UP_BIAS: &str = "up.bias";
/// Second MLP projection, `[d, f]`.
pub const DOWN: &str = "down.weight";
/// Its bias.
pub const DOWN_BIAS: &str = "down.bias";
/// Norm of the attention branch, `[d]`.
pub const NORM1: &str = "norm1.weight";
/// Its bias.
pub const NORM1_BIAS: &str = "norm1.bias";
/// Norm of the MLP branch, `[d]`.
pub const NORM2: &str = "norm2.weight";
/// Its bias.
pub const NORM2_BIAS: &str = "norm2.bias";
/// Token embedding, `[V, e]`; the head too if tied.
pub const EMBEDDING: &str = "embedding.weight";
/// Learned positions, `[positions, d]`.
pub const POSITIONS: &str = "positions.weight";
/// From the embedding's width to the hidden width, `[d, e]`.
pub const PROJECT_IN: &str = "project_in.weight";
/// From the hidden width to the embedding's, `[e, d]`.
pub const PROJECT_OUT: &str = "project_out.weight";
/// Norm before the head, `[d]`.
pub const FINAL_NORM: &str = "norm.weight";
/// Its bias.
pub const FINAL_NORM_BIAS: &str = "norm.bias";
/// Language head of its own, `[V, e]`.
pub const HEAD: &str = "head.weight";
/// Scalar head, `[1, e]`.
pub const SCORE: &str = "score.weight";

/// A flat f32 buffer with a unit's layout: its weights, its gradients or an optimizer moment.
#[derive(Clone, Debug)]
pub struct UnitBuffer {
    layout: Arc<UnitLayout>,
    flat: Tensor,
}

impl UnitBuffer {
    /// A buffer of zeros.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn zeros(layout: &Arc<UnitLayout>) -> Result<Self> {
        let flat = Tensor::zeros(layout.len(), DType::F32, &Device::Cpu)?;
        Ok(Self { layout: layout.clone(), flat })
    }

    /// Initial weights: each parameter drawn at its own address, so that a unit does not depend on the others.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn initial(layout: &Arc<UnitLayout>, seed: u64) -> Result<Self> {
        let philox = Philox::new(seed, Purpose::Init, 0);
        let unit = match layout.id {
            UnitId::Ends => 0,
            UnitId::Block(index) => index as u64 + 1,
        };
        let mut flat = vec![0f32; layout.len()];
        for (index, slot) in layout.params.iter().enumerate() {
            let values = &mut flat[slot.offset..slot.offset + slot.len()];
            match slot.init {
                Init::Zeros => {}
                Init::Ones => values.fill(1.0),
                Init::Normal(std) => philox.fill_normal(unit << 16 | index as u64, 0, std, values),
            }
        }
        Self::from_vec(layout, flat)
    }

    /// A buffer of given elements.
    ///
    /// # Errors
    /// If their number is not the layout's.
    pub fn from_vec(layout: &Arc<UnitLayout>, flat: Vec<f32>) -> Result<Self> {
        if flat.len() != layout.len() {
            return Err(Error::BufferLength { unit: layout.id, expected: layout.len(), got: flat.len() });
        }
        let len = flat.len();
        Ok(Self { layout: layout.clone(), flat: Tensor::from_vec(flat, len, &Device::Cpu)? })
    }

    /// A deep copy.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn duplicate(&self) -> Result<Self> {
        Ok(Self { layout: self.layout.clone(), flat: self.flat.copy()? })
    }

    /// The layout.
    pub fn layout(&self) -> &Arc<UnitLayout> {
        &self.layout
    }

    /// All elements, `[len]`.
    pub fn flat(&self) -> &Tensor {
        &self.flat
    }

    /// View of the parameter `name`, sharing the buffer's storage.
    ///
    /// # Errors
    /// If the unit has no such parameter.
    pub fn get(&self, name: &str) -> Result<Tensor> {
        self.find(name)?.ok_or_else(|| Error::NoParameter { unit: self.layout.id, name: name.to_string() })
    }

    /// View of the parameter `name`, or `None` if the unit has none of that name.
    ///
    /// # Errors
    /// If the tensor library refuses the view.
    pub fn find(&self, name: &str) -> Result<Option<Tensor>> {
        let Some(slot) = self.layout.slot(name) else { return Ok(None) };
        Ok(Some(self.flat.narrow(0, slot.offset, slot.len())?.reshape(slot.shape.as_slice())?))
    }

    /// Overwrites every element with zero, in place.
    ///
    /// # Errors
    /// If the tensor library refuses.
    pub fn clear(&self) -> Result<()> {
        Ok(self.flat.zero_set()?)
    }
}
