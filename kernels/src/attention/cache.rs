//! Keys and values of the sequences being generated, laid out as the forward's packed blocks.

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use super::layout::Stored;
use super::{AttentionSpec, BLOCK_KEYS};
use crate::element::with_element;
use crate::error::check_dims;
use crate::view::{View, view_mut_of, view_of};
use crate::{Error, Result};

/// Keys and values of one layer: `slots` sequences of up to `max_len` tokens each.
///
/// Keys are stored rotated, and laid out per block of 64, so that [`super::decode_attention`] reads what the training
/// forward packs. Clones share the storage.
#[derive(Clone, Debug)]
pub struct KvCacheLayer {
    /// `[slots, blocks, K, elements of a head]`, see [`Stored`].
    keys: Tensor,
    /// As `keys`.
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

/// Elements of the keys and of the values of one block of one head.
fn head_lens(head_dim: usize, dtype: DType) -> Result<(usize, usize)> {
    with_element!("kv cache", dtype, E => Ok(E::head_lens(head_dim)))
}

impl KvCacheLayer {
    /// An empty cache of f32 or bf16 for `slots` sequences of up to `max_len` tokens (rounded up to a multiple of 64).
    ///
    /// # Errors
    /// If the memory cannot be had, a size is zero or the dtype is another.
    pub fn new(slots: usize, max_len: usize, kv_heads: usize, head_dim: usize, dtype: DType) -> Result<Self> {
        if slots == 0 || max_len == 0 || kv_heads == 0 || head_dim == 0 {
            let got = (slots, max_len, kv_heads, head_dim);
            return Err(Error::shape("kv cache", "(slots, max_len, K, D)", "all positive", got));
        }
        let blocks = max_len.div_ceil(BLOCK_KEYS);
        let (keys_len, values_len) = head_lens(head_dim, dtype)?;
        let keys = Tensor::zeros((slots, blocks, kv_heads, keys_len), dtype, &Device::Cpu)?;
        let values = Tensor::zeros((slots, blocks, kv_heads, values_len), dtype, &Device::Cpu)?;
        Ok(Self { keys, values, head_dim })
    }

    /// Bytes that a cache of these sizes takes.
    ///
    /// # Errors
    /// If `dtype` is neither f32 nor bf16.
    pub fn bytes_for(slots: usize, max_len: usize, kv_heads: usize, head_dim: usize, dtype: DType) -> Result<usize> {
        let (keys_len, values_len) = head_lens(head_dim, dtype)?;
        Ok(slots * max_len.div_ceil(BLOCK_KEYS) * kv_heads * (keys_len + values_len) * dtype.size_in_bytes())
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

    /// Type of what is stored: f32 or bf16.
    pub fn dtype(&self) -> DType {
        self.keys.dtype()
    }

    /// Bytes held.
    pub fn size_bytes(&self) -> usize {
        (self.keys.elem_count() + self.values.elem_count()) * self.dtype().size_in_bytes()
    }

    fn blocks(&self) -> usize {
        self.keys.dims()[1]
    }

    /// Elements of the keys and of the values of one block of one head.
    fn head_lens(&self) -> (usize, usize) {
        (self.keys.dims()[3], self.values.dims()[3])
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
        with_element!(OP, self.dtype(), E => self.append_of::<E>(OP, qkv, heads, &self.runs(entries)))
    }

    fn append_of<E: Stored>(&self, op: &'static str, qkv: &Tensor, heads: usize, runs: &[Run]) -> Result<()> {
        let qkv = view_of::<E>(op, qkv)?;
        let (kv_heads, head_dim, (keys_len, values_len)) = (self.kv_heads(), self.head_dim, self.head_lens());
        let width = (heads + 2 * kv_heads) * head_dim;
        let key_column = heads * head_dim;
        let value_column = key_column + kv_heads * head_dim;
        view_mut_of::<E, _>(op, &self.keys, |keys| {
            write_runs(runs, keys, kv_heads * keys_len, |run, block| {
                let source = &qkv[run.row * width..][..run.rows * width];
                for (head, block) in block.chunks_exact_mut(keys_len).enumerate() {
                    E::store_keys(source, width, key_column + head * head_dim, head_dim, run.offset, block);
                }
            });
        })?;
        view_mut_of::<E, _>(op, &self.values, |values| {
            write_runs(runs, values, kv_heads * values_len, |run, block| {
                let source = &qkv[run.row * width..][..run.rows * width];
                for (head, block) in block.chunks_exact_mut(values_len).enumerate() {
                    E::store_values(source, width, value_column + head * head_dim, head_dim, run.offset, block);
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
            let (source, target) = (from * slot..from * slot + copied, to * slot);
            with_element!(OP, self.dtype(), E => {
                view_mut_of::<E, _>(OP, tensor, |values| values.copy_within(source, target))
            })?;
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

    pub(super) fn read<E: Stored>(&self, op: &'static str) -> Result<CacheView<'_, E>> {
        Ok(CacheView { keys: view_of(op, &self.keys)?, values: view_of(op, &self.values)?, layer: self })
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
fn write_runs<E: Stored>(runs: &[Run], storage: &mut [E], block_len: usize, write: impl Fn(&Run, &mut [E]) + Sync) {
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
pub(super) struct CacheView<'a, E> {
    keys: View<'a, E>,
    values: View<'a, E>,
    layer: &'a KvCacheLayer,
}

impl<E: Stored> CacheView<'_, E> {
    /// Keys and values of block `n` of a slot's key-value head.
    pub(super) fn block(&self, slot: usize, head: usize, n: usize) -> (&[E], &[E]) {
        let (keys_len, values_len) = self.layer.head_lens();
        let index = (slot * self.layer.blocks() + n) * self.layer.kv_heads() + head;
        (&self.keys[index * keys_len..][..keys_len], &self.values[index * values_len..][..values_len])
    }
}
