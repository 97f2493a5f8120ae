//! Buffers that MPI may write to or read from, reused: touching fresh pages costs more than the copy into them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::bytes::Plain;

/// What is kept for reuse at most; above it buffers go back to the system.
const KEPT_BYTES: usize = 512 << 20;

/// The free buffers of a process, by size.
#[derive(Default)]
pub(super) struct Pool(Mutex<Free>);

#[derive(Default)]
struct Free {
    by_words: BTreeMap<usize, Vec<Box<[u64]>>>,
    bytes: usize,
}

impl Pool {
    /// A buffer of `length` bytes with unspecified contents.
    pub(super) fn get(self: &Arc<Self>, length: usize) -> Chunk {
        // Few sizes, so that buffers fit again: eighths of powers of two, at most a seventh is wasted.
        let step = (length.next_power_of_two() / 16).max(512);
        let words = length.div_ceil(step).max(1) * step / 8;
        let found = {
            let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let found = free.by_words.get_mut(&words).and_then(Vec::pop);
            free.bytes -= found.as_ref().map_or(0, |_| words * 8);
            found
        };
        let data = found.unwrap_or_else(|| vec![0; words].into_boxed_slice());
        Chunk { data, length, pool: Arc::clone(self) }
    }
}

/// A buffer that goes back to its pool when dropped. Aligned for any number.
pub(super) struct Chunk {
    data: Box<[u64]>,
    length: usize,
    pool: Arc<Pool>,
}

impl Chunk {
    pub(super) fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &crate::bytes::as_bytes(&self.data)[..self.length]
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut crate::bytes::as_bytes_mut(&mut self.data)[..self.length]
    }

    /// The whole numbers in it.
    pub(super) fn numbers<T: Plain>(&self) -> &[T] {
        numbers(self.bytes())
    }

    pub(super) fn numbers_mut<T: Plain>(&mut self) -> &mut [T] {
        let count = self.length / size_of::<T>();
        // SAFETY: a u64 is aligned for every `Plain`, any bytes are valid, and `length` lies within `data`.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_mut_ptr().cast(), count) }
    }
}

/// The whole numbers in `bytes`.
///
/// # Panics
/// If the bytes are not aligned for them.
pub(super) fn numbers<T: Plain>(bytes: &[u8]) -> &[T] {
    assert!(bytes.as_ptr().cast::<T>().is_aligned(), "unaligned numbers");
    // SAFETY: aligned as just checked; any bytes are valid values of a `Plain`.
    unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len() / size_of::<T>()) }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        let data = std::mem::take(&mut self.data);
        let mut free = self.pool.0.lock().unwrap_or_else(PoisonError::into_inner);
        if free.bytes + data.len() * 8 <= KEPT_BYTES {
            free.bytes += data.len() * 8;
            free.by_words.entry(data.len()).or_default().push(data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_reused_and_holds_numbers() {
        let pool = Arc::new(Pool::default());
        let mut chunk = pool.get(1000);
        chunk.numbers_mut::<f32>().fill(1.5);
        assert_eq!((chunk.numbers::<f32>().len(), chunk.numbers::<f64>().len()), (250, 125));
        assert_eq!(chunk.numbers::<f32>()[249], 1.5);
        let place = chunk.bytes().as_ptr();
        drop(chunk);
        let again = pool.get(900);
        assert_eq!(again.bytes().as_ptr(), place, "a buffer of about the size must be found again");
        assert_ne!(pool.get(900).bytes().as_ptr(), place);
        assert!(pool.get(0).bytes().is_empty());
        for length in [1, 4095, 4097, 100_000, (1 << 20) + 1, 5 << 20] {
            let chunk = pool.get(length);
            assert_eq!(chunk.bytes().len(), length);
            assert!(chunk.data.len() * 8 <= length + length / 7 + 512, "{length} bytes waste too much");
        }
    }
}
