//! The one door between candle tensors and the slices that kernels work on.

use std::cell::Cell;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Deref;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Shape, Storage, StorageRef, Tensor};
use rayon::prelude::*;

use crate::element::Element;
use crate::{Error, Result};

/// A read lock on a contiguous CPU tensor; dereferences to its elements.
pub(crate) struct View<'a, E = f32> {
    storage: StorageRef<'a>,
    start: usize,
    len: usize,
    element: PhantomData<E>,
}

impl<E: Element> Deref for View<'_, E> {
    type Target = [E];
    fn deref(&self) -> &[E] {
        match &*self.storage {
            // `view_of` checked the element type under this same lock.
            Storage::Cpu(values) => match E::cpu_storage_as_slice(values) {
                Ok(values) => &values[self.start..self.start + self.len],
                Err(_) => &[],
            },
            _ => &[],
        }
    }
}

/// Start and length of a contiguous layout inside its storage.
fn contiguous(op: &'static str, layout: &Layout) -> Result<(usize, usize)> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok((start, end - start)),
        None => Err(Error::shape(op, "memory layout", "contiguous", layout.stride())),
    }
}

/// Borrows the elements of a contiguous f32 CPU tensor.
pub(crate) fn view<'a>(op: &'static str, tensor: &'a Tensor) -> Result<View<'a>> {
    view_of::<f32>(op, tensor)
}

/// Borrows the elements of a contiguous CPU tensor of this element type.
pub(crate) fn view_of<'a, E: Element>(op: &'static str, tensor: &'a Tensor) -> Result<View<'a, E>> {
    if tensor.dtype() != E::DTYPE {
        return Err(Error::Dtype { op, dtype: tensor.dtype() });
    }
    let (storage, layout) = tensor.storage_and_layout();
    let (start, len) = contiguous(op, layout)?;
    match &*storage {
        Storage::Cpu(_) => Ok(View { storage, start, len, element: PhantomData }),
        _ => Err(Error::Device { op, device: format!("{:?}", tensor.device().location()) }),
    }
}

/// Adapts a closure to candle's in-place operation, which is the only way to a tensor's elements for writing.
struct Mutate<E, F>(&'static str, Cell<Option<F>>, PhantomData<E>);

impl<E: Element, F: FnOnce(&mut [E])> InplaceOp1 for Mutate<E, F> {
    fn name(&self) -> &'static str {
        self.0
    }
    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("{}: output must be contiguous", self.0);
        };
        let Some(values) = E::slice_mut(storage) else {
            candle_core::bail!("{}: no kernel for dtype {:?}", self.0, storage_dtype(storage));
        };
        if let Some(write) = self.1.take() {
            write(&mut values[start..end]);
        }
        Ok(())
    }
}

fn storage_dtype(storage: &CpuStorage) -> DType {
    use candle_core::backend::BackendStorage;
    storage.dtype()
}

/// Runs `write` on the elements of a contiguous f32 CPU tensor, in place; see [`view_mut_of`].
pub(crate) fn view_mut<R>(op: &'static str, tensor: &Tensor, write: impl FnOnce(&mut [f32]) -> R) -> Result<R> {
    view_mut_of::<f32, R>(op, tensor, write)
}

/// Runs `write` on the elements of a contiguous CPU tensor of this element type, in place.
///
/// The tensor's storage is locked for writing meanwhile: `write` must not touch another view of the same storage.
pub(crate) fn view_mut_of<E: Element, R>(
    op: &'static str,
    tensor: &Tensor,
    write: impl FnOnce(&mut [E]) -> R,
) -> Result<R> {
    if !matches!(tensor.device(), Device::Cpu) {
        return Err(Error::Device { op, device: format!("{:?}", tensor.device().location()) });
    }
    let result = Cell::new(None);
    let write = Cell::new(Some(|values: &mut [E]| result.set(Some(write(values)))));
    tensor.inplace_op1(&Mutate(op, write, PhantomData))?;
    // The closure above ran: `inplace_op1` returned Ok.
    result.into_inner().ok_or(Error::Dtype { op, dtype: tensor.dtype() })
}

/// A CPU tensor from a vector.
pub(crate) fn tensor<E: Element>(values: Vec<E>, shape: impl Into<Shape>) -> Result<Tensor> {
    Ok(Tensor::from_vec(values, shape.into(), &Device::Cpu)?)
}

/// Rows of `columns` elements that make a task worth giving to a thread (16,384 elements).
pub(crate) fn rows_per_task(columns: usize) -> usize {
    (16_384 / columns.max(1)).max(1)
}

/// A vector in the making, whose memory is first touched by the tasks that write it.
///
/// `vec![0.0; n]` would have one thread write all of it before the others do so again.
pub(crate) struct Output<E> {
    /// Empty, of capacity `len` at least.
    values: Vec<E>,
    len: usize,
    /// Elements that the latest [`Output::chunks`] has handed out.
    started: AtomicUsize,
}

impl<E: Element> Output<E> {
    pub(crate) fn new(len: usize) -> Self {
        Self { values: Vec::with_capacity(len), len, started: AtomicUsize::new(0) }
    }

    /// Chunks of `size` elements for parallel writing, each zeroed when its task begins.
    pub(crate) fn chunks(&mut self, size: usize) -> impl IndexedParallelIterator<Item = &mut [E]> {
        let started = &self.started;
        started.store(0, Ordering::Relaxed);
        let chunks = self.values.spare_capacity_mut()[..self.len].par_chunks_mut(size.max(1));
        // Few at a time: cores may differ in speed, and who is early takes from who is late.
        chunks.with_max_len(4).map(|chunk| {
            chunk.fill(MaybeUninit::new(E::narrow(0.0)));
            started.fetch_add(chunk.len(), Ordering::Relaxed);
            // SAFETY: every element of the chunk was just written.
            unsafe { &mut *(std::ptr::from_mut(chunk) as *mut [E]) }
        })
    }

    /// The vector.
    ///
    /// # Panics
    /// If not every chunk was visited.
    pub(crate) fn into_vec(mut self) -> Vec<E> {
        assert_eq!(self.started.into_inner(), self.len, "an output is written whole");
        // SAFETY: the chunks of one call are disjoint and each is counted once, after it was filled; so all are.
        unsafe { self.values.set_len(self.len) };
        self.values
    }

    /// The vector as a CPU tensor.
    pub(crate) fn into_tensor(self, shape: impl Into<Shape>) -> Result<Tensor> {
        tensor(self.into_vec(), shape)
    }
}
