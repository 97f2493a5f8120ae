//! The allocator of the commands: one that keeps what a step has freed for the next one.

use std::ffi::{c_int, c_long};

use libmimalloc_sys::mi_option_set_default;

/// What every binary declares as its `#[global_allocator]`.
pub use mimalloc::MiMalloc as Allocator;

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
    /// Longer than a step, shorter than a phase.
    const DELAY_MS: c_long = 30_000;
    // SAFETY: both options exist in version 2 and 3 of mimalloc and may be set at any time.
    unsafe {
        mi_option_set_default(ALLOW_LARGE_OS_PAGES, 1);
        mi_option_set_default(PURGE_DELAY_MS, DELAY_MS);
    }
}
