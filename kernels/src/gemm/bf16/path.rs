//! Which instructions multiply bf16: the choice, made once at run time.

use std::sync::atomic::{AtomicU8, Ordering};

use crate::simd::Isa;

/// A way to multiply bf16 matrices, slowest first.
///
/// All paths multiply exactly (a product of two bf16 numbers fits in f32) and sum in f32 in blocks of
/// [`K_BLOCK_BF16`](super::K_BLOCK_BF16) terms, but inside a block the instructions fix the order of the sum, so the
/// paths differ from each other in the last bits of the f32 sum. Within one path an element's bits depend on its own
/// row, column and number of terms alone. [`Bf16Path::Dot`] and [`Bf16Path::Amx`] read and write subnormal numbers as
/// zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Bf16Path {
    /// f32 fused multiply-adds on widened numbers, compiled for each [`Isa`]: one chain in the order of `k`.
    Widen = 1,
    /// AVX-512-bf16: one chain over the pairs of terms.
    Dot = 2,
    /// AMX tiles: 32 terms at a time, those of even and those of odd `k` in a chain each, the two joined and added.
    Amx = 3,
}

static FORCED: AtomicU8 = AtomicU8::new(0);

impl Bf16Path {
    /// The fastest path of this processor, asking the operating system for the tile registers if there are some.
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        if Isa::detect() >= Isa::Avx512 && is_x86_feature_detected!("avx512bf16") {
            return if crate::amx::available() { Bf16Path::Amx } else { Bf16Path::Dot };
        }
        Bf16Path::Widen
    }

    /// The path in use: the fastest, unless [`Bf16Path::force`] chose another; [`Bf16Path::Widen`] where
    /// [`Isa::force`] chose a set without 512-bit registers.
    #[inline]
    pub fn active() -> Self {
        if Isa::active() < Isa::Avx512 {
            return Bf16Path::Widen;
        }
        match FORCED.load(Ordering::Relaxed) {
            1 => Bf16Path::Widen,
            2 => Bf16Path::Dot,
            3 => Bf16Path::Amx,
            _ => {
                let path = Self::detect();
                FORCED.store(path as u8, Ordering::Relaxed);
                path
            }
        }
    }

    /// Uses `self` for the whole process if the processor has it; returns whether it does.
    pub fn force(self) -> bool {
        let has = self <= Self::detect();
        if has {
            FORCED.store(self as u8, Ordering::Relaxed);
        }
        has
    }
}
