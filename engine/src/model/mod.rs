//! The model: units, and passes over packed batches through them.

mod block;
mod ends;
pub mod export;
pub mod families;
pub mod gguf;
pub mod import;
mod linear;
mod names;
mod pass;
pub mod spec;
mod trace;
pub mod unit;

use std::sync::Arc;

use candle_core::Tensor;
use tandem_kernels::attention::{AttentionSpec, KvCacheLayer, attention, decode_attention};
use tandem_kernels::rope::RopeTable;

pub use pass::Dropout;
pub use trace::{Recompute, Trace};

use crate::batch::Packed;
use crate::{Error, Result};
use block::Block;
use ends::{Ends, check_targets};
use pass::{Pass, PassDropout};
use spec::{ModelSpec, PositionKind};
use unit::{Head, UnitBuffer, UnitLayout};

/// A model: its spec, its head and the weights of its units.
///
/// Clones share the weights.
#[derive(Clone, Debug)]
pub struct Model {
    spec: ModelSpec,
    head: Head,
    units: Vec<UnitBuffer>,
    rope: Option<RopeTable>,
    attention: AttentionSpec,
}

/// Log-probability of labels and entropy of the distributions they come from, `[N]` each, in nats.
#[derive(Clone, Debug)]
pub struct LogProbs {
    /// Natural log-probability of each label.
    pub logp: Tensor,
    /// Entropy of each row's distribution.
    pub entropy: Tensor,
}

impl Model {
    /// A model of given weights: the ends first, then the blocks.
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
        let rope = match spec.positions {
            PositionKind::Rotary { theta, scaling } => {
                Some(RopeTable::new(spec.head_dim, spec.max_positions, theta, scaling)?)
            }
            PositionKind::Learned { .. } => None,
        };
        let attention = AttentionSpec {
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            causal: true,
            window: spec.window,
            scale: 1.0 / (spec.head_dim as f32).sqrt(),
        };
        Ok(Self { spec, head, units, rope, attention })
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

    /// A copy that shares no weight with this one: a reference policy, for instance.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn duplicate(&self) -> Result<Self> {
        let units = self.units.iter().map(UnitBuffer::duplicate).collect::<Result<_>>()?;
        Ok(Self { units, ..self.clone() })
    }

    /// What the model is.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// What it computes from its last rows.
    pub fn head(&self) -> Head {
        self.head
    }

    /// Its weights: the ends, then the blocks.
    pub fn units(&self) -> &[UnitBuffer] {
        &self.units
    }

    /// Number of parameters.
    pub fn parameters(&self) -> usize {
        self.units.iter().map(|unit| unit.layout().len()).sum()
    }

    /// Zero buffers of the units' layouts, as for gradients.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn zeros_like_units(&self) -> Result<Vec<UnitBuffer>> {
        self.units.iter().map(|unit| UnitBuffer::zeros(unit.layout())).collect()
    }

    fn ends(&self) -> Ends<'_> {
        Ends { spec: &self.spec, weights: &self.units[0] }
    }

    fn block(&self, index: usize) -> Block<'_> {
        Block { spec: &self.spec, index, weights: &self.units[index + 1] }
    }

    fn pass<'a>(&'a self, cu_seqlens: &'a [u32], positions: &'a [u32], dropout: Option<PassDropout>) -> Pass<'a> {
        Pass { attention: &self.attention, rope: self.rope.as_ref(), cu_seqlens, positions, dropout }
    }

    /// Hidden rows `[T, d]` after the last block, keeping nothing and dropping nothing.
    fn hidden(&self, batch: &Packed) -> Result<Tensor> {
        batch.check(self.spec.max_positions)?;
        let pass = self.pass(&batch.cu_seqlens, &batch.positions, None);
        let (mut x, _) = self.ends().embed(&batch.ids, &pass)?;
        for index in 0..self.spec.layers {
            x = self.block(index).infer(&x, &pass, |qkv| Ok(attention(qkv, pass.cu_seqlens, pass.attention)?.0))?;
        }
        Ok(x)
    }

    /// Log-probability that row `rows[n]` of the batch gives to the token `labels[n]`.
    ///
    /// This is *the* log-probability: what the sampler records, what the reference policy scores and what training
    /// differentiates agree bit for bit. There is no dropout here.
    ///
    /// # Errors
    /// If the batch does not fit the model or a row or label does not exist.
    pub fn log_probs(&self, batch: &Packed, rows: &[u32], labels: &[u32]) -> Result<LogProbs> {
        check_targets(batch.tokens(), rows, Some(labels))?;
        let x = self.hidden(batch)?;
        let selected = self.ends().head_rows(&x, rows)?;
        let out = self.ends().log_probs(&selected.h, labels)?;
        Ok(LogProbs { logp: out.logp, entropy: out.entropy })
    }

    /// Score `[N]` at each of `rows` of the batch; for models with a scalar head.
    ///
    /// # Errors
    /// If the batch does not fit the model, a row does not exist or the head is not scalar.
    pub fn scores(&self, batch: &Packed, rows: &[u32]) -> Result<Tensor> {
        check_targets(batch.tokens(), rows, None)?;
        let x = self.hidden(batch)?;
        let selected = self.ends().head_rows(&x, rows)?;
        self.ends().scores(&selected.h)
    }

    /// Logits of every row, `[T, V]`: for tests and for looking at a model; training never stores them.
    ///
    /// # Errors
    /// If the batch does not fit the model.
    pub fn logits(&self, batch: &Packed) -> Result<Tensor> {
        let x = self.hidden(batch)?;
        let rows: Vec<u32> = (0..batch.tokens() as u32).collect();
        self.ends().logits(&self.ends().head_rows(&x, &rows)?.h)
    }

    /// Reads prompts into the cache, sequence `b` into slot `slots[b]`; returns the last row of each as it enters the
    /// head, `[B, e]`.
    pub(crate) fn prefill(&self, batch: &Packed, cache: &[KvCacheLayer], slots: &[usize]) -> Result<Tensor> {
        batch.check(self.spec.max_positions)?;
        let entries: Vec<(usize, usize)> = slots
            .iter()
            .enumerate()
            .flat_map(|(sequence, &slot)| (0..batch.rows(sequence).len()).map(move |position| (slot, position)))
            .collect();
        let pass = self.pass(&batch.cu_seqlens, &batch.positions, None);
        let (mut x, _) = self.ends().embed(&batch.ids, &pass)?;
        for (index, layer) in cache.iter().enumerate() {
            x = self.block(index).infer(&x, &pass, |qkv| {
                layer.append(qkv, self.spec.heads, &entries)?;
                Ok(attention(qkv, pass.cu_seqlens, pass.attention)?.0)
            })?;
        }
        let last: Vec<u32> = batch.cu_seqlens[1..].iter().map(|end| end - 1).collect();
        Ok(self.ends().head_rows(&x, &last)?.h)
    }

    /// One token per active slot: token `ids[r]` at position `places[r].1` of slot `places[r].0`; returns the rows as
    /// they enter the head, `[R, e]`.
    pub(crate) fn decode(&self, ids: &[u32], places: &[(usize, usize)], cache: &[KvCacheLayer]) -> Result<Tensor> {
        let positions: Vec<u32> = places.iter().map(|&(_, position)| position as u32).collect();
        let visible: Vec<(usize, usize)> = places.iter().map(|&(slot, position)| (slot, position + 1)).collect();
        let pass = self.pass(&[], &positions, None);
        let (mut x, _) = self.ends().embed(ids, &pass)?;
        for (index, layer) in cache.iter().enumerate() {
            x = self.block(index).infer(&x, &pass, |qkv| {
                layer.append(qkv, self.spec.heads, places)?;
                Ok(decode_attention(qkv, layer, &visible, pass.attention)?)
            })?;
        }
        let all: Vec<u32> = (0..ids.len() as u32).collect();
        Ok(self.ends().head_rows(&x, &all)?.h)
    }

    /// Logits of rows that [`Model::prefill`] or [`Model::decode`] returned, `[R, V]`.
    pub(crate) fn head_logits(&self, h: &Tensor) -> Result<Tensor> {
        self.ends().logits(h)
    }
}
