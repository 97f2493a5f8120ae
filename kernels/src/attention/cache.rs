//! Keys and values of the sequences being generated, laid out as the forward's packed blocks.

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::blocks::{copy_head, padded, transpose_head};
use super::{AttentionSpec, BLOCK_KEYS};
use crate::error::check_dims;
use crate::view::{View, view, view_mut};
use crate::{Error, Result};

/// Keys and values of one layer: `slots` sequences of up to `max_len` tokens each.
///
/// Keys are stored rotated, and transposed per block of 64, so that [`super::decode_attention`] reads what the training
/// forward packs. Clones share the storage.
#[derive(Clone, Debug)]
pub struct KvCacheLayer {
    /// `[slots, blocks, K, D, 64]`.
    keys: Tensor,
    /// `[slots, blocks, K, 64, D padded to 16]`.
    values: Tensor,
    head_dim: usize,
}

/// Consecutive rows of a batch that go to consecutive places of one block.
struct Run {
    /// Block among all blocks of all slots.
    block: usize,
    /// First place in the block.
    offset: usize,
    /// First row of the batch.
    row: usize,
    rows: usize,
}

impl KvCacheLayer {
    /// An empty cache for `slots` sequences of up to `max_len` tokens (rounded up to a multiple of 64).
    ///
    /// # Errors
    /// If the memory cannot be had or a size is zero.
    pub fn new(slots: usize, max_len: usize, kv_heads: usize, head_dim: usize) -> Result<Self> {
        if slots == 0 || max_len == 0 || kv_heads == 0 || head_dim == 0 {
            let got = (slots, max_len, kv_heads, head_dim);
            return Err(Error::shape("kv cache", "(slots, max_len, K, D)", "all positive", got));
        }
        let blocks = max_len.div_ceil(BLOCK_KEYS);
        let dtype = candle_core::DType::F32;
        let keys = Tensor::zeros((slots, blocks, kv_heads, head_dim, BLOCK_KEYS), dtype, &Device::Cpu)?;
        let values = Tensor::zeros((slots, blocks, kv_heads, BLOCK_KEYS, padded(head_dim)), dtype, &Device::Cpu)?;
        Ok(Self { keys, values, head_dim })
    }

    /// Sequences that fit.
    pub fn slots(&self) -> usize {
        self.keys.dims()[0]
    }

    /// Tokens that fit in a slot.
    pub fn max_len(&self) -> usize {
        self.blocks() * BLOCK_KEYS
    }

    /// Key-value heads, K.
    pub fn kv_heads(&self) -> usize {
        self.keys.dims()[2]
    }

    /// Head width, D.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Bytes held.
    pub fn size_bytes(&self) -> usize {
        (self.keys.elem_count() + self.values.elem_count()) * size_of::<f32>()
    }

    fn blocks(&self) -> usize {
        self.keys.dims()[1]
    }

    /// Elements of the keys and of the values of one block of one head.
    fn head_lens(&self) -> (usize, usize) {
        (self.head_dim * BLOCK_KEYS, padded(self.head_dim) * BLOCK_KEYS)
    }

    /// Stores the key and value heads of `qkv [T, (H + 2K) D]`, keys already rotated; row `t` goes to `entries[t]`, a
    /// (slot, position). `heads` is H.
    ///
    /// # Errors
    /// [`Error::Index`] if a slot or position does not exist; else if a shape, dtype or device does not fit.
    pub fn append(&self, qkv: &Tensor, heads: usize, entries: &[(usize, usize)]) -> Result<()> {
        const OP: &str = "kv cache append";
        let width = (heads + 2 * self.kv_heads()) * self.head_dim;
        check_dims(OP, "qkv", &[entries.len(), width], qkv.dims())?;
        for &(slot, position) in entries {
            self.check_slot(OP, slot)?;
            if position >= self.max_len() {
                return Err(Error::Index { op: OP, what: "position", index: position, limit: self.max_len() });
            }
        }
        let (runs, qkv) = (self.runs(entries), view(OP, qkv)?);
        let (kv_heads, head_dim, (keys_len, values_len)) = (self.kv_heads(), self.head_dim, self.head_lens());
        let key_column = heads * head_dim;
        let value_column = key_column + kv_heads * head_dim;
        view_mut(OP, &self.keys, |keys| {
            write_runs(&runs, keys, kv_heads * keys_len, |run, block| {
                let source = &qkv[run.row * width..][..run.rows * width];
                for (head, block) in block.chunks_exact_mut(keys_len).enumerate() {
                    transpose_head(source, width, key_column + head * head_dim, run.offset, block);
                }
            });
        })?;
        view_mut(OP, &self.values, |values| {
            write_runs(&runs, values, kv_heads * values_len, |run, block| {
                let source = &qkv[run.row * width..][..run.rows * width];
                for (head, block) in block.chunks_exact_mut(values_len).enumerate() {
                    copy_head(source, width, value_column + head * head_dim, head_dim, run.offset, block);
                }
            });
        })
    }

    /// Copies the first `len` tokens of slot `from` to slot `to`: samples of one prompt share its prefill.
    ///
    /// Whole blocks are copied; what lies beyond `len` in the last of them is not visible until it is written.
    ///
    /// # Errors
    /// [`Error::Index`] if a slot or `len` does not exist.
    pub fn copy_prefix(&self, from: usize, to: usize, len: usize) -> Result<()> {
        const OP: &str = "kv cache copy";
        self.check_slot(OP, from)?;
        self.check_slot(OP, to)?;
        if len > self.max_len() {
            return Err(Error::Index { op: OP, what: "prefix length", index: len, limit: self.max_len() + 1 });
        }
        let (keys_len, values_len) = self.head_lens();
        for (tensor, head_len) in [(&self.keys, keys_len), (&self.values, values_len)] {
            let block = self.kv_heads() * head_len;
            let slot = self.blocks() * block;
            let copied = len.div_ceil(BLOCK_KEYS) * block;
            view_mut(OP, tensor, |values| values.copy_within(from * slot..from * slot + copied, to * slot))?;
        }
        Ok(())
    }

    pub(super) fn check_slot(&self, op: &'static str, slot: usize) -> Result<()> {
        if slot < self.slots() {
            Ok(())
        } else {
            Err(Error::Index { op, what: "slot", index: slot, limit: self.slots() })
        }
    }

    /// Refuses a `spec` whose heads are not those of this cache.
    pub(super) fn check_spec(&self, op: &'static str, spec: &AttentionSpec) -> Result<()> {
        let (expected, got) = ([self.kv_heads(), self.head_dim], [spec.kv_heads, spec.head_dim]);
        check_dims(op, "key-value heads and head width", &expected, &got)
    }

    pub(super) fn read(&self, op: &'static str) -> Result<CacheView<'_>> {
        Ok(CacheView { keys: view(op, &self.keys)?, values: view(op, &self.values)?, layer: self })
    }

    /// Joins neighbouring entries and sorts them by block.
    fn runs(&self, entries: &[(usize, usize)]) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        for (row, &(slot, position)) in entries.iter().enumerate() {
            let (block, offset) = (slot * self.blocks() + position / BLOCK_KEYS, position % BLOCK_KEYS);
            match runs.last_mut() {
                Some(run) if run.block == block && run.offset + run.rows == offset => run.rows += 1,
                _ => runs.push(Run { block, offset, row, rows: 1 }),
            }
        }
        // Stable: of two entries for one place, the later row stays.
        runs.sort_by_key(|run| run.block);
        runs
    }
}

/// Calls `write(run, block)` for every run, blocks in parallel.
fn write_runs(runs: &[Run], storage: &mut [f32], block_len: usize, write: impl Fn(&Run, &mut [f32]) + Sync) {
    let mut tasks = Vec::new();
    let (mut rest, mut passed) = (storage, 0);
    for group in runs.chunk_by(|a, b| a.block == b.block) {
        let start = group[0].block * block_len;
        let (block, tail) = rest.split_at_mut(start - passed).1.split_at_mut(block_len);
        tasks.push((group, block));
        (rest, passed) = (tail, start + block_len);
    }
    tasks.into_par_iter().for_each(|(group, block)| {
        for run in group {
            write(run, block);
        }
    });
}

/// A read lock on a cache.
pub(super) struct CacheView<'a> {
    keys: View<'a>,
    values: View<'a>,
    layer: &'a KvCacheLayer,
}

impl CacheView<'_> {
    /// Keys `[D, 64]` and values `[64, D padded]` of block `n` of a slot's key-value head.
    pub(super) fn block(&self, slot: usize, head: usize, n: usize) -> (&[f32], &[f32]) {
        let (keys_len, values_len) = self.layer.head_lens();
        let index = (slot * self.layer.blocks() + n) * self.layer.kv_heads() + head;
        (&self.keys[index * keys_len..][..keys_len], &self.values[index * values_len..][..values_len])
    }
}
