//! The allocator of the commands: one that keeps what a step has freed for the next one, and lays tensors out without gaps.

mod blocks;

use std::alloc::{GlobalAlloc, Layout};
use std::ffi::{c_int, c_long};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use blocks::Blocks;
use libmimalloc_sys::mi_option_set_default;
use memmap2::{MmapMut, MmapOptions, UncheckedAdvice};
use mimalloc::MiMalloc;

/// What every binary declares as its `#[global_allocator]`: [`mimalloc`], but for what is large.
///
/// Mimalloc puts blocks of some MiB into chunks of 32 MiB that they do not fill, and into places of their own size: of what a
/// training step held of a model of 135 million parameters at its peak, a tenth was such gaps. Here large blocks share one
/// range of addresses, of which the lowest that fits is taken.
#[derive(Debug)]
pub struct Allocator;

/// From so many bytes on a block is large.
const LARGE: usize = 1 << 20;
/// Alignment that any large block has: that of a page, which is no smaller anywhere.
const ALIGNMENT: usize = 1 << 12;
/// Large blocks are multiples of this: the largest page that there is, for memory goes back in whole pages.
const UNIT: usize = 1 << 16;
/// Addresses for large blocks: more than there will be memory.
const RANGE: usize = 1 << 40;
/// How long freed memory is kept: longer than a step, shorter than a phase.
const DELAY: Duration = Duration::from_secs(30);

/// The addresses of large blocks, if the system has granted them.
static MEMORY: OnceLock<Option<MmapMut>> = OnceLock::new();
/// The first of them; 0 if there are none.
static START: AtomicUsize = AtomicUsize::new(0);
static BLOCKS: Mutex<Blocks> = Mutex::new(Blocks::new(0, RANGE));

/// Keeps freed memory for as long as a step may take, and asks for huge pages.
///
/// A step allocates and frees the same hundreds of MiB as the one before. If they went back to the system in between, it would
/// have to clear every page again: some 5 % of a step. To be called first in `main`; `MIMALLOC_…` variables of the environment
/// go before it.
pub fn keep_pages() {
    /// `mi_option_allow_large_os_pages`, which the bindings do not name.
    const ALLOW_LARGE_OS_PAGES: c_int = 6;
    /// `mi_option_purge_delay`, in ms.
    const PURGE_DELAY_MS: c_int = 15;
    // SAFETY: both options exist in version 2 and 3 of mimalloc and may be set at any time.
    unsafe {
        mi_option_set_default(ALLOW_LARGE_OS_PAGES, 1);
        mi_option_set_default(PURGE_DELAY_MS, DELAY.as_millis() as c_long);
    }
}

/// Asks for the addresses of large blocks, at the first of them.
fn memory() -> Option<&'static MmapMut> {
    let ask = || {
        if !cfg!(target_os = "linux") {
            return None;
        }
        let memory = MmapOptions::new().len(RANGE).no_reserve_swap().map_anon().ok()?;
        #[cfg(target_os = "linux")]
        // Without huge pages it is slower, no more.
        let _ = memory.advise(memmap2::Advice::HugePage);
        START.store(memory.as_ptr().addr(), Ordering::Release);
        Some(memory)
    };
    MEMORY.get_or_init(ask).as_ref()
}

/// Whether a block is one of the large ones.
fn is_large(block: *mut u8) -> bool {
    let start = START.load(Ordering::Acquire);
    start != 0 && block.addr().wrapping_sub(start) < RANGE
}

/// Bytes that a block of `size` bytes takes.
fn rounded(size: usize) -> usize {
    size.next_multiple_of(UNIT)
}

/// Runs `work` on what is free, after old memory has gone back.
fn with_blocks<R>(memory: &MmapMut, work: impl FnOnce(&mut Blocks, Instant) -> R) -> R {
    // Whoever panics does so without this lock.
    let mut blocks = BLOCKS.lock().unwrap_or_else(PoisonError::into_inner);
    let now = Instant::now();
    blocks.release(now, DELAY, |at, len| {
        // SAFETY: nobody has this part, and an anonymous private mapping reads as zeros after.
        unsafe { memory.unchecked_advise_range(UncheckedAdvice::DontNeed, at, len) }.is_ok()
    });
    work(&mut blocks, now)
}

/// A large block, and whether it holds zeros; `None` if it must come from elsewhere.
fn take(layout: Layout) -> Option<(*mut u8, bool)> {
    if layout.size() < LARGE || layout.size() > RANGE || layout.align() > ALIGNMENT {
        return None;
    }
    let memory = memory()?;
    let taken = with_blocks(memory, |blocks, _| blocks.take(rounded(layout.size())))?;
    // The mapping is written through these pointers only.
    Some((memory.as_ptr().cast_mut().wrapping_add(taken.at), taken.is_zero))
}

// SAFETY: a block is either of mimalloc's or lies in the mapping, which is never unmapped; there no two blocks share an
// address, all begin at a page, and none is longer than what was taken for it. Which of the two a block is follows from its
// address.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match take(layout) {
            Some((block, _)) => block,
            // SAFETY: the caller vouches for the layout.
            None => unsafe { MiMalloc.alloc(layout) },
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        match take(layout) {
            Some((block, is_zero)) => {
                if !is_zero {
                    // SAFETY: the block has so many bytes.
                    unsafe { block.write_bytes(0, layout.size()) };
                }
                block
            }
            // SAFETY: the caller vouches for the layout.
            None => unsafe { MiMalloc.alloc_zeroed(layout) },
        }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        match MEMORY.get() {
            Some(Some(memory)) if is_large(block) => {
                let at = block.addr() - memory.as_ptr().addr();
                with_blocks(memory, |blocks, now| blocks.give(at, rounded(layout.size()), now));
            }
            // SAFETY: the caller vouches for the block, and it is mimalloc's.
            _ => unsafe { MiMalloc.dealloc(block, layout) },
        }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if size < LARGE && !is_large(block) {
            // SAFETY: the caller vouches for block and layout, and the block is mimalloc's.
            return unsafe { MiMalloc.realloc(block, layout, size) };
        }
        if is_large(block) && rounded(size) == rounded(layout.size()) {
            return block;
        }
        // SAFETY: the caller vouches for the size and the alignment.
        let new = unsafe { self.alloc(Layout::from_size_align_unchecked(size, layout.align())) };
        if !new.is_null() {
            // SAFETY: both blocks have so many bytes, and they are not the same.
            unsafe {
                block.copy_to_nonoverlapping(new, layout.size().min(size));
                self.dealloc(block, layout);
            }
        }
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(size: usize) -> Layout {
        Layout::from_size_align(size, 64).unwrap()
    }

    #[test]
    fn blocks_hold_what_was_written_and_begin_with_zeros_where_asked() {
        std::thread::scope(|scope| {
            for thread in 1..5u8 {
                scope.spawn(move || {
                    for round in 0..50 {
                        let sizes = [LARGE - 1, LARGE, 3 * LARGE + 5, 100].map(|size| size + 4096 * (round % 3));
                        let blocks = sizes.map(|size| unsafe { Allocator.alloc_zeroed(layout(size)) });
                        for (block, size) in blocks.into_iter().zip(sizes) {
                            assert_eq!(is_large(block), cfg!(target_os = "linux") && size >= LARGE);
                            let bytes = unsafe { std::slice::from_raw_parts_mut(block, size) };
                            assert!(bytes.iter().all(|&byte| byte == 0));
                            bytes.fill(thread);
                        }
                        for (block, size) in blocks.into_iter().zip(sizes) {
                            let other = if round.is_multiple_of(2) { 2 * size } else { size / 2 };
                            let block = unsafe { Allocator.realloc(block, layout(size), other) };
                            let bytes = unsafe { std::slice::from_raw_parts(block, other.min(size)) };
                            assert!(bytes.iter().all(|&byte| byte == thread));
                            unsafe { Allocator.dealloc(block, layout(other)) };
                        }
                    }
                });
            }
        });
    }

    #[test]
    fn what_does_not_fit_is_left_to_the_other() {
        assert!(take(layout(LARGE - 1)).is_none() && take(layout(RANGE + 1)).is_none());
        assert!(take(Layout::from_size_align(LARGE, 2 * ALIGNMENT).unwrap()).is_none());
    }
}
