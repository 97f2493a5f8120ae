//! Copies that do not read what they overwrite.
//!
//! An ordinary store first fetches the line that it changes. For output larger than the caches that is a third of all memory
//! traffic of a copy; `memcpy` avoids it only in single long copies, and ours are short ones to several places.

/// Copies `length` bytes past the caches where the processor can.
///
/// # Safety
/// As [`std::ptr::copy_nonoverlapping`]. Before another thread reads the bytes, this one must call [`fence`].
#[cfg(target_arch = "x86_64")]
pub(super) unsafe fn copy(from: *const u8, to: *mut u8, length: usize) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};

    const STEP: usize = 64;
    let head = to.align_offset(STEP).min(length);
    // SAFETY: all accesses are in `0..length` of both; streamed stores are aligned, since `head` ends on a line; SSE2 is part
    // of x86-64.
    unsafe {
        std::ptr::copy_nonoverlapping(from, to, head);
        let mut at = head;
        while at + STEP <= length {
            for part in 0..4 {
                let value = _mm_loadu_si128(from.add(at + 16 * part).cast());
                _mm_stream_si128(to.add(at + 16 * part).cast::<__m128i>(), value);
            }
            at += STEP;
        }
        std::ptr::copy_nonoverlapping(from.add(at), to.add(at), length - at);
    }
}

/// Makes streamed bytes visible to whoever synchronises with this thread afterwards.
#[cfg(target_arch = "x86_64")]
pub(super) fn fence() {
    // SAFETY: SSE is part of x86-64.
    unsafe { std::arch::x86_64::_mm_sfence() }
}

/// Copies `length` bytes.
///
/// # Safety
/// As [`std::ptr::copy_nonoverlapping`].
#[cfg(not(target_arch = "x86_64"))]
pub(super) unsafe fn copy(from: *const u8, to: *mut u8, length: usize) {
    // SAFETY: the caller's.
    unsafe { std::ptr::copy_nonoverlapping(from, to, length) }
}

/// Nothing to do: there are no streamed stores.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn fence() {}

#[cfg(test)]
mod tests {
    #[test]
    fn every_byte_is_copied_and_no_other() {
        let source: Vec<u8> = (0..1000).map(|i| (i * 37 + 11) as u8).collect();
        for (from, to, length) in
            [(0, 0, 0), (1, 3, 5), (0, 0, 64), (7, 1, 640), (0, 63, 129), (5, 64, 63), (3, 5, 900)]
        {
            let mut target = vec![0xee_u8; 1100];
            let mut expected = target.clone();
            expected[to..to + length].copy_from_slice(&source[from..from + length]);
            // SAFETY: both ranges are inside their vectors.
            unsafe { super::copy(source.as_ptr().add(from), target.as_mut_ptr().add(to), length) };
            super::fence();
            assert_eq!(target, expected);
        }
    }
}
