//! Integers of 8 bits to bf16.

use super::Int8Tile;
use crate::gemm::bf16::pack::Tile;

/// Tiles of integers as tiles of bf16, exactly.
pub(super) fn widen(from: &[Int8Tile], into: &mut [Tile]) {
    assert!(from.len() == into.len());
    #[cfg(target_arch = "x86_64")]
    if crate::simd::Isa::active() >= crate::simd::Isa::Avx512 {
        #[target_feature(enable = "avx512f,avx512bw")]
        fn tiles(from: &[Int8Tile], into: &mut [Tile]) {
            for (from, into) in from.iter().zip(into) {
                prefetch_ahead_of(from);
                // SAFETY: both are whole tiles.
                unsafe { widen_tile(from, into) };
            }
        }
        // SAFETY: AVX-512 F and BW are active.
        return unsafe { tiles(from, into) };
    }
    for (from, into) in from.iter().zip(into) {
        for (pairs, row) in from.0.as_chunks::<32>().0.iter().zip(into.0.as_chunks_mut::<32>().0) {
            for (place, value) in row.iter_mut().enumerate() {
                // The upper half of such an f32 is all of it.
                let wide = f32::from(pairs[place % 2 * 16 + place / 2]);
                *value = half::bf16::from_bits((wide.to_bits() >> 16) as u16);
            }
        }
    }
}

/// Tiles by which integers are asked for ahead of their use: 8 KiB. Those of a matrix lie one after the other, so what lies
/// behind the end of a panel is the next one.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 16;

/// Asks for the tile that is used so much later.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) fn prefetch_ahead_of(tile: &Int8Tile) {
    use crate::prefetch::{LINE, prefetch_line};
    let later = std::ptr::from_ref(tile).wrapping_add(AHEAD).cast::<u8>();
    (0..size_of::<Int8Tile>()).step_by(LINE).for_each(|at| prefetch_line(later.wrapping_add(at)));
}

/// One tile: the upper halves of each two f32 side by side.
///
/// # Safety
/// `into` must have room for a tile; it need not be initialised.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn widen_tile(from: &Int8Tile, into: *mut Tile) {
    use std::arch::x86_64::*;
    let (from, into) = (from.0.as_ptr().cast::<__m128i>(), into.cast::<__m512i>());
    for pair in 0..16 {
        // SAFETY: a tile of integers has 16 times 32 bytes, one of bf16 16 times 64; both begin at a cache line.
        unsafe {
            let wide = |at| {
                let integers = _mm512_cvtepi8_epi32(_mm_load_si128(from.add(at)));
                _mm512_castps_si512(_mm512_cvtepi32_ps(integers))
            };
            let (first, second) = (wide(2 * pair), wide(2 * pair + 1));
            _mm512_store_si512(into.add(pair), _mm512_or_si512(_mm512_srli_epi32::<16>(first), second));
        }
    }
}
