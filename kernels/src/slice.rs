//! The elements of a tensor as a slice: for whoever sends, packs or updates them without a kernel of its own.

use candle_core::Tensor;

use crate::Result;
use crate::view::{View, view, view_mut};

/// Runs `read` on the elements of a contiguous f32 CPU tensor.
///
/// The tensor's storage is locked for reading meanwhile: `read` must not write to a view of the same storage.
///
/// # Errors
/// If the tensor is not contiguous, not f32 or not on the CPU.
pub fn with_slice<R>(tensor: &Tensor, read: impl FnOnce(&[f32]) -> R) -> Result<R> {
    Ok(read(&view("with_slice", tensor)?))
}

/// Runs `write` on the elements of a contiguous f32 CPU tensor, in place.
///
/// The tensor's storage is locked for writing meanwhile: `write` must not touch another view of the same storage.
///
/// # Errors
/// If the tensor is not contiguous, not f32 or not on the CPU.
pub fn with_slice_mut<R>(tensor: &Tensor, write: impl FnOnce(&mut [f32]) -> R) -> Result<R> {
    view_mut("with_slice_mut", tensor, write)
}

/// A contiguous f32 CPU tensor, locked for reading as long as this value lives, that any thread may read.
///
/// It shares the tensor's storage; nothing is copied. Meanwhile everybody may read the storage through other tensors,
/// and whoever wants to write to it waits until this value is dropped: a buffer handed to a thread that sends it cannot
/// change under that thread. So drop it before writing to the storage from the same thread, and do not open another
/// view of the storage on the way to the drop while a writer may be waiting; either would wait for itself.
pub struct SharedTensor {
    // Before `_tensor`: fields are dropped in order, and this one borrows from it.
    view: View<'static>,
    _tensor: Tensor,
}

impl SharedTensor {
    /// Locks `tensor` for reading.
    ///
    /// # Errors
    /// If the tensor is not contiguous, not f32 or not on the CPU.
    pub fn new(tensor: &Tensor) -> Result<Self> {
        let tensor = tensor.clone();
        let view = view("SharedTensor::new", &tensor)?;
        // SAFETY: `view` borrows the lock and the storage behind the tensor's `Arc`, whose address does not change when
        // `tensor` moves into the new value, and which lives at least as long as that value's `_tensor`. The value never
        // gives either away, and drops `view` first, so the borrow ends before what it borrows.
        let view = unsafe { std::mem::transmute::<View<'_>, View<'static>>(view) };
        Ok(Self { view, _tensor: tensor })
    }
}

impl AsRef<[f32]> for SharedTensor {
    fn as_ref(&self) -> &[f32] {
        &self.view
    }
}

impl std::fmt::Debug for SharedTensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SharedTensor").field("len", &self.as_ref().len()).finish()
    }
}

// SAFETY: the only part that is not `Send` by itself is the lock's guard (`parking_lot::RwLockReadGuard`, marked so
// that its deadlock detector can name threads). Its lock is a shared counter that records no thread, and any thread may
// give a shared lock back: `parking_lot` itself offers `Send` guards as its feature `send_guard`. The data behind the guard
// are only read.
unsafe impl Send for SharedTensor {}
