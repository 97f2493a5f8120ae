//! The model: units, and passes over packed batches through them.

mod block;
mod blueprint;
mod choose;
mod ends;
mod exchange;
pub mod export;
pub mod families;
pub mod gguf;
pub mod import;
mod infer;
mod linear;
pub mod lora;
mod names;
mod pass;
mod pieces;
mod placed;
pub mod spec;
mod trace;
pub mod unit;

use std::ops::Range;
use std::sync::Arc;

use candle_core::Tensor;
use tandem_kernels::attention::AttentionSpec;
use tandem_kernels::rope::RopeTable;

pub use blueprint::Blueprint;
pub use pass::Dropout;
pub use trace::{Recompute, Trace};

use crate::parallel::{Fetched, Group, Packing, Parallel, Weights};
use crate::precision::{Precision, WeightFormat};
use crate::{Error, Packed, Result};
use block::Block;
use ends::Ends;
use lora::{Adapted, Adapters};
use pass::{Pass, PassDropout};
use spec::{ModelSpec, PositionKind};
use unit::{Content, Cut, Head, UnitBuffer, UnitLayout};

/// A model: its spec, its head and what this rank holds of the weights of its units.
///
/// Clones share the weights. With several ranks, all those that hold parts of one model call its methods together.
#[derive(Clone, Debug)]
pub struct Model {
    spec: ModelSpec,
    head: Head,
    weights: Weights,
    adapters: Option<Adapters>,
    cut: Cut,
    /// The blocks held here: all but in a pipeline.
    blocks: Range<usize>,
    parallel: Arc<Parallel>,
    /// The ranks that share every block.
    tensor: Arc<Group>,
    rope: Option<RopeTable>,
    /// The attention of each piece held here.
    attention: Vec<AttentionSpec>,
}

/// Log-probability of labels and entropy of the distributions they come from, `[N]` each, in nats.
#[derive(Clone, Debug)]
pub struct LogProbs {
    /// Natural log-probability of each label.
    pub logp: Tensor,
    /// Entropy of each row's distribution.
    pub entropy: Tensor,
}

/// One unit of a model for as long as it is needed.
struct Unit {
    weights: Fetched,
    adapters: Option<Fetched>,
}

impl std::ops::Deref for Unit {
    type Target = UnitBuffer;
    fn deref(&self) -> &UnitBuffer {
        &self.weights
    }
}

impl Model {
    /// A model of given weights on one rank: the ends first, then the blocks.
    ///
    /// # Errors
    /// If the units are not those of the spec, or the rotary table cannot be made.
    pub fn from_parts(spec: ModelSpec, head: Head, units: Vec<UnitBuffer>) -> Result<Self> {
        let layouts = UnitLayout::all(&spec, head);
        for (layout, unit) in layouts.iter().zip(&units) {
            if **unit.layout() != *layout {
                return Err(Error::BufferLength { unit: layout.id, expected: layout.len(), got: unit.layout().len() });
            }
        }
        if layouts.len() != units.len() {
            return Err(Error::UnitCount { expected: layouts.len(), got: units.len() });
        }
        let parallel = Parallel::solo();
        let (tensor, blocks) = (parallel.tensor.clone(), 0..spec.layers);
        Self::assemble(spec, head, Weights::solo(units, Precision::F32), Cut::none(), blocks, parallel, tensor)
    }

    fn assemble(
        spec: ModelSpec,
        head: Head,
        weights: Weights,
        cut: Cut,
        blocks: Range<usize>,
        parallel: Arc<Parallel>,
        tensor: Arc<Group>,
    ) -> Result<Self> {
        let rope = match spec.positions {
            PositionKind::Rotary { theta, scaling } => {
                Some(RopeTable::new(spec.head_dim, spec.max_positions, theta, scaling)?)
            }
            PositionKind::Learned { .. } => None,
        };
        let attention = |index: usize| {
            let piece = cut.piece(&spec, index);
            AttentionSpec {
                heads: piece.heads.len(),
                kv_heads: piece.kv_heads.len(),
                head_dim: spec.head_dim,
                causal: true,
                window: spec.window,
                scale: 1.0 / (spec.head_dim as f32).sqrt(),
            }
        };
        let attention = cut.held.clone().map(attention).collect();
        Ok(Self { spec, head, weights, adapters: None, cut, blocks, parallel, tensor, rope, attention })
    }

    /// A model with initial weights drawn from `seed`.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn initial(spec: ModelSpec, head: Head, seed: u64) -> Result<Self> {
        let layouts = UnitLayout::all(&spec, head);
        let units = layouts.into_iter().map(|layout| UnitBuffer::initial(&Arc::new(layout), seed));
        let units = units.collect::<Result<_>>()?;
        Self::from_parts(spec, head, units)
    }

    /// A copy that shares nothing with this one that training changes: a reference policy, for instance. The base of adapters,
    /// which nothing changes, is shared.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn duplicate(&self) -> Result<Self> {
        let mut copy = self.clone();
        match &mut copy.adapters {
            Some(adapters) => adapters.weights = adapters.weights.duplicate()?,
            None => copy.weights = self.weights.duplicate()?,
        }
        Ok(copy)
    }

    /// The same weights, whole on this rank, computing in `precision`. Those that are trained stay in f32.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn with_precision(mut self, precision: Precision) -> Result<Self> {
        self.weights = Weights::solo(self.units()?, precision);
        Ok(self)
    }

    /// The same weights, whole on this rank, kept in `precision` only, or the linear maps of blocks in `weights`: for models
    /// that are not trained.
    ///
    /// # Errors
    /// If the memory cannot be had, or the weights cannot be kept so.
    pub fn frozen(mut self, precision: Precision, weights: WeightFormat) -> Result<Self> {
        weights.check(precision)?;
        if precision == Precision::F32 {
            return Ok(self);
        }
        let tensor = &self.tensor;
        let kept = |unit: UnitBuffer| match weights {
            WeightFormat::Precision => unit.narrowed(),
            WeightFormat::Int8 => unit.quantised(tensor),
        };
        self.weights = match self.weights {
            // Each unit is let go of before the next is narrowed.
            Weights::Whole(whole) => {
                let kept = whole.into_masters().map(|unit| kept(unit?)).collect::<Result<_>>()?;
                Weights::solo(kept, precision)
            }
            sliced @ Weights::Sliced(_) => {
                let kept = |index| kept(sliced.fetch_master(index)?);
                Weights::solo((0..=self.spec.layers).map(kept).collect::<Result<_>>()?, precision)
            }
        };
        Ok(self)
    }

    /// What the linear maps of its blocks are kept in.
    pub fn weight_format(&self) -> WeightFormat {
        self.weights.format()
    }

    /// Bytes of the weights that this rank has whole, as passes compute with them; without adapters.
    ///
    /// # Errors
    /// If ranks have lost each other.
    pub fn computed_bytes(&self) -> Result<usize> {
        (0..=self.spec.layers).map(|index| Ok(self.weights.fetch(index, 0, None)?.size_bytes())).sum()
    }

    /// What passes compute in.
    pub fn precision(&self) -> Precision {
        self.weights.precision()
    }

    /// Keeps the matrices of whole units packed for decoding from now on, or no longer: several times as fast with few rows.
    /// What changes is packed again when it is next needed. There is no plain bf16 matrix of a block beside a packed one; those
    /// of a model that is not trained stay packed.
    pub(crate) fn keep_packed(&self, wants_packed: bool) {
        self.weights.set_packing(match (wants_packed, &self.adapters) {
            (false, _) => Packing::None,
            (true, None) => Packing::Instead,
            // Adapters are trained through plain matrices.
            (true, Some(_)) => Packing::Beside,
        });
    }

    /// What the model is.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// What it computes from its last rows.
    pub fn head(&self) -> Head {
        self.head
    }

    /// What this rank holds of the weights in f32, without adapters: the ends, then the blocks. Where weights are sliced, they
    /// are brought together: for looking at a model, and for models that fit one rank.
    ///
    /// # Errors
    /// If ranks have lost each other.
    pub fn units(&self) -> Result<Vec<UnitBuffer>> {
        (0..=self.spec.layers).map(|index| self.weights.fetch_master(index)).collect()
    }

    /// The layouts of what this rank computes, without adapters.
    pub fn layouts(&self) -> Vec<Arc<UnitLayout>> {
        self.weights.layouts()
    }

    /// The layouts of what this rank trains: the adapters if there are any, else the weights.
    pub fn trained_layouts(&self) -> Vec<Arc<UnitLayout>> {
        self.trained().layouts()
    }

    /// Number of parameters of the whole model, without adapters.
    pub fn parameters(&self) -> usize {
        UnitLayout::all(&self.spec, self.head).iter().map(UnitLayout::len).sum()
    }

    /// Number of parameters that are trained.
    pub fn trained_parameters(&self) -> usize {
        UnitLayout::all(&self.spec, self.trained_content()).iter().map(UnitLayout::len).sum()
    }

    /// This rank's place.
    pub fn parallel(&self) -> &Arc<Parallel> {
        &self.parallel
    }

    /// What is trained: the adapters if there are any, else the weights.
    pub(crate) fn trained(&self) -> &Weights {
        self.adapters.as_ref().map_or(&self.weights, |adapters| &adapters.weights)
    }

    /// What the units that are trained hold.
    pub(crate) fn trained_content(&self) -> Content {
        match &self.adapters {
            Some(adapters) => Content::Adapters(adapters.set.clone()),
            None => Content::Weights(self.head),
        }
    }

    pub(crate) fn cut(&self) -> &Cut {
        &self.cut
    }

    /// The attention of each piece held here.
    pub(crate) fn attention(&self) -> &[AttentionSpec] {
        &self.attention
    }

    /// The weights and adapters of unit `index` for a pass over few tokens, while those of `next` may already be on their way.
    fn unit(&self, index: usize, next: impl IntoIterator<Item = usize, IntoIter: Clone>) -> Result<Unit> {
        self.unit_of_pass(index, 0, next)
    }

    /// As [`Self::unit`], for a pass over `tokens` tokens.
    fn unit_of_pass(
        &self,
        index: usize,
        tokens: usize,
        next: impl IntoIterator<Item = usize, IntoIter: Clone>,
    ) -> Result<Unit> {
        let next = next.into_iter();
        let weights = self.weights.fetch(index, tokens, next.clone())?;
        let adapters =
            self.adapters.as_ref().map(|adapters| adapters.weights.fetch(index, tokens, next)).transpose()?;
        Ok(Unit { weights, adapters })
    }

    fn ends<'a>(&'a self, unit: &'a Unit) -> Ends<'a> {
        Ends { spec: &self.spec, weights: unit, adapters: unit.adapters.as_deref(), tensor: &self.tensor }
    }

    fn block<'a>(&'a self, index: usize, unit: &'a Unit) -> Block<'a> {
        let adapters = self.adapters.as_ref().zip(unit.adapters.as_deref());
        let adapted = Adapted { spec: &self.spec, index, adapters };
        Block { spec: &self.spec, index, weights: unit, adapted }
    }

    /// The gradients of a unit, if those of the weights are wanted.
    fn base_grads<'a>(&self, grads: &'a UnitBuffer) -> Option<&'a UnitBuffer> {
        self.adapters.is_none().then_some(grads)
    }

    fn dropout_of(&self, dropout: Option<Dropout>, batch: &Packed) -> Option<PassDropout> {
        PassDropout::of(dropout, self.lora().map_or(0.0, |lora| lora.dropout), batch)
    }

    fn pass<'a>(&'a self, cu_seqlens: &'a [u32], positions: &'a [u32], dropout: Option<PassDropout>) -> Pass<'a> {
        let (attention, tensor) = (&*self.attention, &*self.tensor);
        Pass { attention, tensor, rope: self.rope.as_ref(), cu_seqlens, positions, dropout, onward: None }
    }

    /// The pass over `batch` to a head that reads `rows`.
    fn pass_to<'a>(&'a self, batch: &'a Packed, rows: &'a [u32], dropout: Option<PassDropout>) -> Pass<'a> {
        self.pass(&batch.cu_seqlens, &batch.positions, dropout).read_at(rows, batch.tokens())
    }

    /// The units that a forward goes through after the block `index`, in order.
    fn after(&self, index: usize) -> impl Iterator<Item = usize> + Clone + use<> {
        let ends = self.parallel.is_last_stage().then_some(0);
        (index + 2..self.blocks.end + 1).chain(ends)
    }

    /// The units that a backward goes through after the block `index`, in order.
    fn before(&self, index: usize) -> impl Iterator<Item = usize> + Clone + use<> {
        let ends = (self.parallel.is_first_stage() && self.embeds_with_projection()).then_some(0);
        (self.blocks.start + 1..index + 1).rev().chain(ends)
    }
}
