//! Keys and values of the sequences under way, for all layers.

use tandem_kernels::attention::{AttentionSpec, KvCacheLayer};

use crate::Result;
use crate::model::Model;
use crate::model::spec::ModelSpec;
use crate::precision::Precision;

/// Room for sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheSize {
    /// Sequences at once.
    pub slots: usize,
    /// Tokens of a sequence, prompt and response together.
    pub max_len: usize,
}

impl CacheSize {
    /// Bytes that a cache of this size takes for a model of `spec` that computes in `precision`.
    pub fn bytes(&self, spec: &ModelSpec, precision: Precision) -> usize {
        let Self { slots, max_len } = *self;
        let layer = KvCacheLayer::bytes_for(slots, max_len, spec.kv_heads, spec.head_dim, precision.dtype());
        spec.layers * layer.expect("there are caches of every precision")
    }
}

/// The cache of one model.
#[derive(Debug)]
pub struct KvCache {
    /// For each block, one cache for each piece held here.
    pub(super) layers: Vec<Vec<KvCacheLayer>>,
    size: CacheSize,
}

impl KvCache {
    /// An empty cache.
    ///
    /// # Errors
    /// If the memory cannot be had or a size is zero.
    pub fn new(model: &Model, size: CacheSize) -> Result<Self> {
        let dtype = model.precision().dtype();
        let piece = |piece: &AttentionSpec| {
            Ok(KvCacheLayer::new(size.slots, size.max_len, piece.kv_heads, piece.head_dim, dtype)?)
        };
        let layer = |_| model.attention().iter().map(piece).collect::<Result<_>>();
        Ok(Self { layers: (0..model.spec().layers).map(layer).collect::<Result<_>>()?, size })
    }

    /// Whether there is room for `size`.
    pub(crate) fn holds(&self, size: CacheSize) -> bool {
        self.size.slots >= size.slots && self.size.max_len >= size.max_len
    }

    /// Its size.
    pub fn size(&self) -> CacheSize {
        self.size
    }

    /// Bytes held.
    pub fn size_bytes(&self) -> usize {
        self.layers.iter().flatten().map(KvCacheLayer::size_bytes).sum()
    }

    /// Copies the first `len` tokens of one slot to another, in every layer.
    pub(super) fn copy_prefix(&self, from: usize, to: usize, len: usize) -> Result<()> {
        self.layers.iter().flatten().try_for_each(|layer| Ok(layer.copy_prefix(from, to, len)?))
    }
}
