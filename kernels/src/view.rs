//! The one door between candle tensors and the slices that kernels work on.

use std::cell::Cell;
use std::ops::Deref;

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Shape, Storage, StorageRef, Tensor};

use crate::{Error, Result};

/// A read lock on a contiguous f32 CPU tensor; dereferences to its elements.
pub(crate) struct View<'a> {
    storage: StorageRef<'a>,
    start: usize,
    len: usize,
}

impl Deref for View<'_> {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        match &*self.storage {
            // `view` checked the variant under this same lock.
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.start..self.start + self.len],
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
    if tensor.dtype() != DType::F32 {
        return Err(Error::Dtype { op, dtype: tensor.dtype() });
    }
    let (storage, layout) = tensor.storage_and_layout();
    let (start, len) = contiguous(op, layout)?;
    match &*storage {
        Storage::Cpu(CpuStorage::F32(_)) => Ok(View { storage, start, len }),
        _ => Err(Error::Device { op, device: format!("{:?}", tensor.device().location()) }),
    }
}

/// Adapts a closure to candle's in-place operation, which is the only way to a tensor's elements for writing.
struct Mutate<F>(&'static str, Cell<Option<F>>);

impl<F: FnOnce(&mut [f32])> InplaceOp1 for Mutate<F> {
    fn name(&self) -> &'static str {
        self.0
    }
    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let CpuStorage::F32(values) = storage else {
            candle_core::bail!("{}: no kernel for dtype {:?}", self.0, storage_dtype(storage));
        };
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("{}: output must be contiguous", self.0);
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

/// Runs `write` on the elements of a contiguous f32 CPU tensor, in place.
///
/// The tensor's storage is locked for writing meanwhile: `write` must not touch another view of the same storage.
pub(crate) fn view_mut<R>(op: &'static str, tensor: &Tensor, write: impl FnOnce(&mut [f32]) -> R) -> Result<R> {
    if !matches!(tensor.device(), Device::Cpu) {
        return Err(Error::Device { op, device: format!("{:?}", tensor.device().location()) });
    }
    let result = Cell::new(None);
    tensor.inplace_op1(&Mutate(op, Cell::new(Some(|values: &mut [f32]| result.set(Some(write(values)))))))?;
    // The closure above ran: `inplace_op1` returned Ok.
    result.into_inner().ok_or(Error::Dtype { op, dtype: tensor.dtype() })
}

/// A CPU tensor from a vector.
pub(crate) fn tensor(values: Vec<f32>, shape: impl Into<Shape>) -> Result<Tensor> {
    Ok(Tensor::from_vec(values, shape.into(), &Device::Cpu)?)
}

/// Rows of `columns` elements that make a task worth giving to a thread (64 KiB of f32).
pub(crate) fn rows_per_task(columns: usize) -> usize {
    (16_384 / columns.max(1)).max(1)
}
