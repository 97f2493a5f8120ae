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
    const TILE: usize = size_of::<Tile>();
    const PITCH: usize = 4 * LINES;
    let (a, b) = (a.as_chunks::<2>().0, b.as_chunks::<2>().0);
    assert!(a.len() == b.len());
    tiles.zero::<0>();
    tiles.zero::<1>();
    tiles.zero::<2>();
    tiles.zero::<3>();
    for (a, b) in a.iter().zip(b) {
        let next = b.as_ptr().wrapping_add(2 * AHEAD).cast::<u8>();
        (0..TILE).step_by(LINE).for_each(|at| prefetch_line(next.wrapping_add(at)));
        let (a, b) = (a.as_ptr().cast::<u8>(), b.as_ptr().cast::<u8>());
        // SAFETY: each of the two pairs holds two tiles.
        unsafe {
            tiles.load::<4>(a, 64);
            tiles.load::<6>(b, 64);
            tiles.multiply_add::<0, 4, 6>();
            tiles.load::<7>(b.add(TILE), 64);
            tiles.multiply_add::<1, 4, 7>();
            if rows > 16 {
                tiles.load::<5>(a.add(TILE), 64);
                tiles.multiply_add::<2, 5, 6>();
                tiles.multiply_add::<3, 5, 7>();
            }
        }
    }
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
