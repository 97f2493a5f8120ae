//! Hints that bring memory nearer before it is read.
//!
//! Decoding reads every weight and every cached key once for a few rows: it waits for memory, not for arithmetic, and the
//! processor fetches ahead by itself within a page of 4 KiB only.

/// Bytes that come at once.
pub(crate) const LINE: usize = 64;

/// Asks for the line at `at`, which need not be memory of ours: a hint neither reads nor fails.
#[inline(always)]
pub(crate) fn prefetch_line<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint that reads nothing.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Asks for all of `values`.
#[inline(always)]
pub(crate) fn prefetch<T>(values: &[T]) {
    let start = values.as_ptr().cast::<u8>();
    for at in (0..size_of_val(values)).step_by(LINE) {
        prefetch_line(start.wrapping_add(at));
    }
}

/// Asks for the line at `at` in order to write it: a store to a line that is not there, or that another processor has,
/// holds up those after it.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn prefetch_line_to_write<T>(at: *const T) {
    // SAFETY: a hint that reads and writes nothing, and that every processor of 64 bits takes, if only as nothing to do. In
    // assembly, because the intrinsic asks for reading unless the whole build is for processors known to have it.
    unsafe { std::arch::asm!("prefetchw [{}]", in(reg) at, options(nostack, preserves_flags)) };
}
