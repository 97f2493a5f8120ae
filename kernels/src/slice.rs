//! The elements of a tensor as a slice, in f32 or bf16, and the way between the two: for whoever sends, packs, converts or
//! updates them without a kernel of its own.

use candle_core::{DType, Tensor};
use half::bf16;
use rayon::prelude::*;

use crate::Result;
use crate::element::{Element, with_element};
use crate::error::check_dims;
use crate::simd::simd_fn;
use crate::view::{Output, View, view_mut_of, view_of};

/// Elements that one task converts.
const CHUNK: usize = 16 * 1024;

/// `len` zeros, written by all threads.
///
/// # Errors
/// If the element type is neither f32 nor bf16.
pub fn zeros(len: usize, dtype: DType) -> Result<Tensor> {
    with_element!("zeros", dtype, E => {
        let mut zeros = Output::<E>::new(len);
        zeros.chunks(CHUNK).for_each(|_| ());
        zeros.into_tensor(len)
    })
}

/// Runs `read` on the elements of a contiguous f32 CPU tensor; see [`with_slice_of`].
///
/// # Errors
/// If the tensor is not contiguous, not f32 or not on the CPU.
pub fn with_slice<R>(tensor: &Tensor, read: impl FnOnce(&[f32]) -> R) -> Result<R> {
    Ok(read(&view_of("with_slice", tensor)?))
}

/// Runs `read` on the elements of a contiguous CPU tensor of this element type.
///
/// The tensor's storage is locked for reading meanwhile: `read` must not write to a view of the same storage.
///
/// # Errors
/// If the tensor is not contiguous, not of this type or not on the CPU.
pub fn with_slice_of<E: Element, R>(tensor: &Tensor, read: impl FnOnce(&[E]) -> R) -> Result<R> {
    Ok(read(&view_of("with_slice_of", tensor)?))
}

/// Runs `write` on the elements of a contiguous f32 CPU tensor, in place; see [`with_slice_mut_of`].
///
/// # Errors
/// If the tensor is not contiguous, not f32 or not on the CPU.
pub fn with_slice_mut<R>(tensor: &Tensor, write: impl FnOnce(&mut [f32]) -> R) -> Result<R> {
    view_mut_of("with_slice_mut", tensor, write)
}

/// Runs `write` on the elements of a contiguous CPU tensor of this element type, in place.
///
/// The tensor's storage is locked for writing meanwhile: `write` must not touch another view of the same storage.
///
/// # Errors
/// If the tensor is not contiguous, not of this type or not on the CPU.
pub fn with_slice_mut_of<E: Element, R>(tensor: &Tensor, write: impl FnOnce(&mut [E]) -> R) -> Result<R> {
    view_mut_of("with_slice_mut_of", tensor, write)
}

/// Rounds every element of `from` to the nearest bf16, ties to even; NaN stays NaN.
///
/// # Errors
/// [`crate::Error::Shape`] if the lengths differ.
pub fn narrow_slice(from: &[f32], into: &mut [bf16]) -> Result<()> {
    check_dims("narrow_slice", "destination", &[from.len()], &[into.len()])?;
    from.par_chunks(CHUNK).zip(into.par_chunks_mut(CHUNK)).for_each(|(from, into)| convert(from, into));
    Ok(())
}

/// Writes every element of `from` as f32, exactly.
///
/// # Errors
/// [`crate::Error::Shape`] if the lengths differ.
pub fn widen_slice(from: &[bf16], into: &mut [f32]) -> Result<()> {
    check_dims("widen_slice", "destination", &[from.len()], &[into.len()])?;
    from.par_chunks(CHUNK).zip(into.par_chunks_mut(CHUNK)).for_each(|(from, into)| convert(from, into));
    Ok(())
}

/// A contiguous f32 CPU tensor in bf16, rounded as [`narrow_slice`] does; a bf16 tensor is returned as it is.
///
/// # Errors
/// If the tensor is of another dtype, not contiguous or not on the CPU.
pub fn to_bf16(tensor: &Tensor) -> Result<Tensor> {
    if tensor.dtype() == DType::BF16 { Ok(tensor.clone()) } else { converted::<f32, bf16>("to_bf16", tensor) }
}

/// A contiguous bf16 CPU tensor in f32, exactly; an f32 tensor is returned as it is.
///
/// # Errors
/// If the tensor is of another dtype, not contiguous or not on the CPU.
pub fn to_f32(tensor: &Tensor) -> Result<Tensor> {
    if tensor.dtype() == DType::F32 { Ok(tensor.clone()) } else { converted::<bf16, f32>("to_f32", tensor) }
}

fn converted<A: Element, B: Element>(op: &'static str, tensor: &Tensor) -> Result<Tensor> {
    let from = view_of::<A>(op, tensor)?;
    let mut into = Output::<B>::new(from.len());
    from.par_chunks(CHUNK).zip(into.chunks(CHUNK)).for_each(|(from, into)| convert(from, into));
    into.into_tensor(tensor.shape())
}

simd_fn! { pub(crate) fn convert<A: Element, B: Element>(from: &[A], into: &mut [B]) = convert_body; }

#[inline(always)]
fn convert_body<A: Element, B: Element, const FMA: bool>(from: &[A], into: &mut [B]) {
    for (into, from) in into.iter_mut().zip(from) {
        *into = B::narrow(from.wide());
    }
}

/// A contiguous CPU tensor, f32 unless said otherwise, locked for reading as long as this value lives, that any thread may
/// read.
///
/// It shares the tensor's storage; nothing is copied. Meanwhile everybody may read the storage through other tensors,
/// and whoever wants to write to it waits until this value is dropped: a buffer handed to a thread that sends it cannot
/// change under that thread. So drop it before writing to the storage from the same thread, and do not open another
/// view of the storage on the way to the drop while a writer may be waiting; either would wait for itself.
pub struct SharedTensor<E: Element = f32> {
    // Before `_tensor`: fields are dropped in order, and this one borrows from it.
    view: View<'static, E>,
    _tensor: Tensor,
}

impl SharedTensor {
    /// Locks an f32 `tensor` for reading.
    ///
    /// # Errors
    /// If the tensor is not contiguous, not f32 or not on the CPU.
    pub fn new(tensor: &Tensor) -> Result<Self> {
        Self::of(tensor)
    }
}

impl<E: Element> SharedTensor<E> {
    /// Locks a `tensor` of this element type for reading.
    ///
    /// # Errors
    /// If the tensor is not contiguous, not of this type or not on the CPU.
    pub fn of(tensor: &Tensor) -> Result<Self> {
        let tensor = tensor.clone();
        let view = view_of::<E>("SharedTensor", &tensor)?;
        // SAFETY: `view` borrows the lock and the storage behind the tensor's `Arc`, whose address does not change when
        // `tensor` moves into the new value, and which lives at least as long as that value's `_tensor`. The value never
        // gives either away, and drops `view` first, so the borrow ends before what it borrows.
        let view = unsafe { std::mem::transmute::<View<'_, E>, View<'static, E>>(view) };
        Ok(Self { view, _tensor: tensor })
    }
}

impl<E: Element> AsRef<[E]> for SharedTensor<E> {
    fn as_ref(&self) -> &[E] {
        &self.view
    }
}

impl<E: Element> std::fmt::Debug for SharedTensor<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SharedTensor").field("len", &self.as_ref().len()).finish()
    }
}

// SAFETY: the only part that is not `Send` by itself is the lock's guard (`parking_lot::RwLockReadGuard`, marked so
// that its deadlock detector can name threads). Its lock is a shared counter that records no thread, and any thread may
// give a shared lock back: `parking_lot` itself offers `Send` guards as its feature `send_guard`. The data behind the guard
// are only read.
unsafe impl<E: Element> Send for SharedTensor<E> {}
