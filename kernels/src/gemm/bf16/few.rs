//! The innermost loop on tile registers for a few rows: every panel of B is read once and comes from far away.

use super::pack::{LINES, Tile};
use super::tile::Sums;
use crate::amx::Tiles;
use crate::prefetch::{LINE, prefetch_line};

/// Steps of 32 terms by which B is asked for ahead of its use: 8 KiB. It is the panels of a matrix one after the other, so
/// what lies behind the end of a panel is the next one. Only every other tile is asked for: the processor follows by itself,
/// and with more than it can hold requests for, everything would wait.
const AHEAD: usize = 4;

/// `sums = A·B` over whole steps of 32 terms, of `rows` rows: as [`super::amx::multiply`].
pub(super) fn multiply(tiles: &Tiles, rows: usize, a: &[Tile], b: &[Tile], sums: &mut Sums) {
    let (a, b) = (a.as_chunks::<2>().0, b.as_chunks::<2>().0);
    assert!(a.len() == b.len());
    start(tiles);
    for (a, b) in a.iter().zip(b) {
        let next = b.as_ptr().wrapping_add(2 * AHEAD).cast::<u8>();
        (0..size_of::<Tile>()).step_by(LINE).for_each(|at| prefetch_line(next.wrapping_add(at)));
        // SAFETY: each of the two pairs holds two tiles.
        unsafe { step(tiles, rows, a.as_ptr(), b.as_ptr()) };
    }
    finish(tiles, rows, sums);
}

/// Begins sums with zeros.
#[inline(always)]
pub(super) fn start(tiles: &Tiles) {
    tiles.zero::<0>();
    tiles.zero::<1>();
    tiles.zero::<2>();
    tiles.zero::<3>();
}

/// Adds a step of 32 terms, of `rows` rows.
///
/// # Safety
/// Two tiles must lie at `a`, and at `b`.
#[inline(always)]
pub(super) unsafe fn step(tiles: &Tiles, rows: usize, a: *const Tile, b: *const Tile) {
    // SAFETY: the caller vouches for the tiles.
    unsafe {
        tiles.load::<4>(a.cast(), 64);
        tiles.load::<6>(b.cast(), 64);
        tiles.multiply_add::<0, 4, 6>();
        tiles.load::<7>(b.add(1).cast(), 64);
        tiles.multiply_add::<1, 4, 7>();
        if rows > 16 {
            tiles.load::<5>(a.add(1).cast(), 64);
            tiles.multiply_add::<2, 5, 6>();
            tiles.multiply_add::<3, 5, 7>();
        }
    }
}

/// Stores the sums of `rows` rows.
#[inline(always)]
pub(super) fn finish(tiles: &Tiles, rows: usize, sums: &mut Sums) {
    const PITCH: usize = 4 * LINES;
    let c = sums.0.as_mut_ptr().cast::<u8>();
    // SAFETY: `sums` holds 32 rows of 128 bytes.
    unsafe {
        tiles.store::<0>(c, PITCH);
        tiles.store::<1>(c.add(64), PITCH);
        if rows > 16 {
            tiles.store::<2>(c.add(16 * PITCH), PITCH);
            tiles.store::<3>(c.add(16 * PITCH + 64), PITCH);
        }
    }
}
