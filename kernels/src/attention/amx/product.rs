//! Products of 32 columns of a right matrix on tiles.

use half::bf16;

use crate::amx::Tiles;

/// Terms that one tile instruction adds: the columns of a left tile.
pub(super) const STEP: usize = 32;

/// Columns of a product.
pub(super) const COLUMNS: usize = 32;

/// A left matrix; row `r` starts at `r · stride`.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    pub(super) values: &'a [bf16],
    pub(super) stride: usize,
}

/// A right matrix of pairs `[rows / 2, stride, 2]`: rows `2i` and `2i + 1` interleaved.
#[derive(Clone, Copy)]
pub(super) struct Pairs<'a> {
    pub(super) values: &'a [bf16],
    pub(super) stride: usize,
}

/// `C (+)= A · B` for `ROWS` (16 or 32) rows, `steps` times 32 terms and 32 columns; row `r` of C starts at
/// `r · c_stride`. Without `accumulate`, C starts from zero.
///
/// Every element is one chain over the pairs of terms in order.
#[inline(always)]
pub(super) fn product<const ROWS: usize>(
    tiles: &Tiles,
    a: Left,
    b: Pairs,
    steps: usize,
    c: &mut [f32],
    c_stride: usize,
    accumulate: bool,
) {
    assert!(ROWS == 16 || ROWS == 32);
    assert!(steps > 0 && a.values.len() >= (ROWS - 1) * a.stride + steps * STEP, "left matrix");
    assert!(b.values.len() >= ((steps * STEP / 2 - 1) * b.stride + COLUMNS) * 2, "right matrix");
    assert!(c.len() >= (ROWS - 1) * c_stride + COLUMNS, "product");
    let (a_stride, b_stride, c_bytes) = (a.stride * 2, b.stride * 4, c_stride * 4);
    let (mut left, mut right) = (a.values.as_ptr().cast::<u8>(), b.values.as_ptr().cast::<u8>());
    let c = c.as_mut_ptr().cast::<u8>();
    // SAFETY: the assertions above: every row of 64 bytes read or written lies in its slice.
    unsafe {
        if accumulate {
            tiles.load::<0>(c, c_bytes);
            tiles.load::<1>(c.add(64), c_bytes);
            if ROWS == 32 {
                tiles.load::<2>(c.add(16 * c_bytes), c_bytes);
                tiles.load::<3>(c.add(16 * c_bytes + 64), c_bytes);
            }
        } else {
            tiles.zero::<0>();
            tiles.zero::<1>();
            if ROWS == 32 {
                tiles.zero::<2>();
                tiles.zero::<3>();
            }
        }
        for _ in 0..steps {
            tiles.load::<4>(left, a_stride);
            tiles.load::<6>(right, b_stride);
            tiles.multiply_add::<0, 4, 6>();
            tiles.load::<7>(right.wrapping_add(64), b_stride);
            tiles.multiply_add::<1, 4, 7>();
            if ROWS == 32 {
                tiles.load::<5>(left.wrapping_add(16 * a_stride), a_stride);
                tiles.multiply_add::<2, 5, 6>();
                tiles.multiply_add::<3, 5, 7>();
            }
            left = left.wrapping_add(2 * STEP);
            right = right.wrapping_add(STEP / 2 * b_stride);
        }
        tiles.store::<0>(c, c_bytes);
        tiles.store::<1>(c.add(64), c_bytes);
        if ROWS == 32 {
            tiles.store::<2>(c.add(16 * c_bytes), c_bytes);
            tiles.store::<3>(c.add(16 * c_bytes + 64), c_bytes);
        }
    }
}
