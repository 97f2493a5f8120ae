//! Keys and values of the sequences being generated, laid out as the forward's packed blocks.

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use super::layout::Stored;
use super::{AttentionSpec, BLOCK_KEYS};
use crate::element::with_element;
use crate::error::check_dims;
use crate::view::{view_mut_of, view_of};
use crate::{Error, Result};

/// Keys and values of one layer: `slots` sequences of up to `max_len` tokens each.
///
/// Keys are stored rotated, and laid out per block of 64, so that [`super::decode_attention`] reads what the training
/// forward packs. Clones share the storage.
#[derive(Clone, Debug)]
pub struct KvCacheLayer {
    /// `[slots, blocks, K, elements of a head]`: of each block the keys of all heads and then their values, see [`Stored`].
    /// In this order a step of decoding reads a slot.
    blocks: Tensor,
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
        let blocks = Tensor::zeros((slots, blocks, kv_heads, keys_len + values_len), dtype, &Device::Cpu)?;
        Ok(Self { blocks, head_dim })
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
        self.blocks.dims()[0]
    }

    /// Tokens that fit in a slot.
    pub fn max_len(&self) -> usize {
        self.blocks_of_slot() * BLOCK_KEYS
    }

    /// Key-value heads, K.
    pub fn kv_heads(&self) -> usize {
        self.blocks.dims()[2]
    }

    /// Head width, D.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Type of what is stored: f32 or bf16.
    pub fn dtype(&self) -> DType {
        self.blocks.dtype()
    }

    /// Bytes held.
    pub fn size_bytes(&self) -> usize {
        self.blocks.elem_count() * self.dtype().size_in_bytes()
    }

    fn blocks_of_slot(&self) -> usize {
        self.blocks.dims()[1]
    }

    /// Elements of one block of one head.
    fn head_len(&self) -> usize {
        self.blocks.dims()[3]
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
        let (kv_heads, head_dim, head_len) = (self.kv_heads(), self.head_dim, self.head_len());
        let (keys_len, _) = E::head_lens(head_dim);
        let width = (heads + 2 * kv_heads) * head_dim;
        view_mut_of::<E, _>(op, &self.blocks, |blocks| {
            write_runs(runs, blocks, kv_heads * head_len, |run, block| {
                let source = &qkv[run.row * width..][..run.rows * width];
                let (keys, values) = block.split_at_mut(kv_heads * keys_len);
                let heads_of_block = keys.chunks_exact_mut(keys_len).zip(values.chunks_exact_mut(head_len - keys_len));
                for (head, (keys, values)) in heads_of_block.enumerate() {
                    let (key, value) = ((heads + head) * head_dim, (heads + kv_heads + head) * head_dim);
                    E::store_keys(source, width, key, head_dim, run.offset, keys);
                    E::store_values(source, width, value, head_dim, run.offset, values);
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
        let block = self.kv_heads() * self.head_len();
        let slot = self.blocks_of_slot() * block;
        let copied = len.div_ceil(BLOCK_KEYS) * block;
        with_element!(OP, self.dtype(), E => view_mut_of::<E, _>(OP, &self.blocks, |blocks| {
            blocks.copy_within(from * slot..from * slot + copied, to * slot);
            let (keys_len, values_len) = E::head_lens(self.head_dim);
            if let Some(last) = blocks[to * slot..][len / BLOCK_KEYS * block..copied].get_mut(self.kv_heads() * keys_len..) {
                for values in last.chunks_exact_mut(values_len) {
                    E::clear_values(self.head_dim, len % BLOCK_KEYS, values);
                }
            }
        }))
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

    /// Runs `work` on the blocks; they may be written if `writes`.
    pub(super) fn with_blocks<E: Stored, R>(
        &self,
        op: &'static str,
        writes: bool,
        work: impl FnOnce(&Blocks<'_, E>) -> R,
    ) -> Result<R> {
        if writes {
            return view_mut_of::<E, _>(op, &self.blocks, |blocks| work(&Blocks::new(blocks.as_mut_ptr(), self)));
        }
        let blocks = view_of::<E>(op, &self.blocks)?;
        Ok(work(&Blocks::new(blocks.as_ptr().cast_mut(), self)))
    }

    /// Joins neighbouring entries and sorts them by block.
    fn runs(&self, entries: &[(usize, usize)]) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        for (row, &(slot, position)) in entries.iter().enumerate() {
            let (block, offset) = (slot * self.blocks_of_slot() + position / BLOCK_KEYS, position % BLOCK_KEYS);
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

/// The blocks of a locked cache, as tasks see them that each work on some heads of some slots.
pub(super) struct Blocks<'a, E> {
    start: *mut E,
    layer: &'a KvCacheLayer,
}

// SAFETY: the storage is locked, and writing to it is an unsafe function that requires it to be exclusive.
unsafe impl<E: Send> Send for Blocks<'_, E> {}
// SAFETY: as above.
unsafe impl<E: Sync> Sync for Blocks<'_, E> {}

impl<'a, E: Stored> Blocks<'a, E> {
    fn new(start: *mut E, layer: &'a KvCacheLayer) -> Self {
        Self { start, layer }
    }

    /// Keys of block `n` of a slot's key-value head.
    pub(super) fn keys(&self, slot: usize, head: usize, n: usize) -> &[E] {
        let (start, len) = self.keys_place(slot, head, n);
        // SAFETY: the storage holds this block; who writes to it does not read it meanwhile, by the contract of `store`.
        unsafe { std::slice::from_raw_parts(start, len) }
    }

    /// Values of block `n` of a slot's key-value head.
    pub(super) fn values(&self, slot: usize, head: usize, n: usize) -> &[E] {
        let (start, len) = self.values_place(slot, head, n);
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(start, len) }
    }

    /// Stores the key and the value at `position` of a slot's head, from their columns of `row`.
    ///
    /// # Safety
    /// The blocks may be written, and no other task works on this head of this slot.
    pub(super) unsafe fn store(&self, slot: usize, head: usize, position: usize, row: &[E], columns: [usize; 2]) {
        let (n, offset, head_dim) = (position / BLOCK_KEYS, position % BLOCK_KEYS, self.layer.head_dim);
        let (keys, values) = (self.keys_place(slot, head, n), self.values_place(slot, head, n));
        // SAFETY: these two places, which do not overlap, are this task's by contract, and it holds no reference to them.
        let (keys, values) = unsafe {
            (std::slice::from_raw_parts_mut(keys.0, keys.1), std::slice::from_raw_parts_mut(values.0, values.1))
        };
        E::store_keys(row, row.len(), columns[0], head_dim, offset, keys);
        E::store_values(row, row.len(), columns[1], head_dim, offset, values);
    }

    fn keys_place(&self, slot: usize, head: usize, n: usize) -> (*mut E, usize) {
        let (len, _) = E::head_lens(self.layer.head_dim);
        (self.start(slot, head, n).wrapping_add(head * len), len)
    }

    fn values_place(&self, slot: usize, head: usize, n: usize) -> (*mut E, usize) {
        let (keys_len, len) = E::head_lens(self.layer.head_dim);
        (self.start(slot, head, n).wrapping_add(self.layer.kv_heads() * keys_len + head * len), len)
    }

    /// Where block `n` of a slot starts, which has this head.
    fn start(&self, slot: usize, head: usize, n: usize) -> *mut E {
        let layer = self.layer;
        let blocks = layer.blocks_of_slot();
        assert!(slot < layer.slots() && n < blocks && head < layer.kv_heads(), "a block that is not there");
        self.start.wrapping_add((slot * blocks + n) * layer.kv_heads() * layer.head_len())
    }
}
