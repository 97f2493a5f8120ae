//! Small matrix products held in registers, eight rows by two vectors: the inner loops of attention of many rows.

use std::array;
use std::ops::Range;

use super::tasks::Ahead;
use super::tile::Right;
use crate::math::LANES;
use crate::simd::{fma, simd_fn};

/// Rows of the tiles of [`multiply`].
pub(super) const ROWS: usize = 8;

/// The left matrix `A`, whose element `[r, t]` lies at `r · row + t · step`.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    pub(super) values: &'a [f32],
    pub(super) row: usize,
    pub(super) step: usize,
}

/// `C[r, n] (+)= Σ_t A[r, t] · B[t, n]` for `r` of `rows`, which begin and end at multiples of 8, `t` over `steps` in
/// order, and `n` below `columns`, a multiple of 16.
///
/// Every element is one chain of fused multiply-adds over `t`, whatever the tiling. Row `r` of `C` starts at
/// `r · c_stride`; without `accumulate`, C starts from zero. Every tile is a step of what is asked for ahead.
pub(super) fn multiply(
    a: Left,
    rows: Range<usize>,
    b: Right,
    steps: Range<usize>,
    c: &mut [f32],
    c_stride: usize,
    columns: usize,
    accumulate: bool,
    ahead: &mut Ahead,
) {
    assert!(rows.start.is_multiple_of(ROWS) && rows.end.is_multiple_of(ROWS) && columns.is_multiple_of(LANES));
    if rows.is_empty() || columns == 0 {
        return;
    }
    assert!(c.len() >= (rows.end - 1) * c_stride + columns, "multiply: C is too short");
    if !steps.is_empty() {
        assert!(a.values.len() > (rows.end - 1) * a.row + (steps.end - 1) * a.step, "multiply: A is too short");
        assert!(b.values.len() >= (steps.end - 1) * b.stride + columns, "multiply: B is too short");
    }
    #[cfg(target_arch = "x86_64")]
    if crate::Isa::active() >= crate::Isa::Avx512 {
        for column in (0..columns).step_by(2 * LANES) {
            for row in rows.clone().step_by(ROWS) {
                ahead.step();
                // SAFETY: AVX-512 is active, and the tile lies inside the three matrices.
                unsafe {
                    let (a_values, b_values) = (a.values.as_ptr(), b.values.as_ptr().add(column));
                    let c = c.as_mut_ptr().add(row * c_stride + column);
                    let (t, a) = (steps.clone(), (a_values.add(row * a.row), a.row, a.step));
                    avx512::tile(a, (b_values, b.stride), t, (c, c_stride), columns - column, accumulate);
                }
            }
        }
        return;
    }
    narrow(a, rows, b, steps, c, c_stride, columns, accumulate);
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;
    use std::ops::Range;

    use super::ROWS;
    use crate::gemm::{each_row, multiply_add};
    use crate::math::LANES;

    /// Eight rows of one or two vectors, as `columns` has; matrices as a pointer and their strides.
    ///
    /// # Safety
    /// The processor has AVX-512, and the matrices hold the tile.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn tile(
        a: (*const f32, usize, usize),
        b: (*const f32, usize),
        steps: Range<usize>,
        c: (*mut f32, usize),
        columns: usize,
        accumulate: bool,
    ) {
        // SAFETY: by contract.
        unsafe {
            match (a.1, columns > LANES) {
                (1, true) => sums::<ROWS, 2, 1>(a, b, steps, c, accumulate),
                (32, true) => sums::<ROWS, 2, 32>(a, b, steps, c, accumulate),
                (64, true) => sums::<ROWS, 2, 64>(a, b, steps, c, accumulate),
                (128, true) => sums::<ROWS, 2, 128>(a, b, steps, c, accumulate),
                (_, true) => sums::<ROWS, 2, 0>(a, b, steps, c, accumulate),
                (_, false) => sums::<ROWS, 1, 0>(a, b, steps, c, accumulate),
            }
        }
    }

    /// [`tile`] of `R` rows of `NV` vectors, with rows of A `ROW` apart, or as far as it says if that is 0.
    ///
    /// Where that is known, every other row of A is read by the multiplications themselves: fewer instructions, of which a
    /// core that serves two programs has too few.
    #[target_feature(enable = "avx512f")]
    unsafe fn sums<const R: usize, const NV: usize, const ROW: usize>(
        (a, row, step): (*const f32, usize, usize),
        (b, b_stride): (*const f32, usize),
        steps: Range<usize>,
        (c, c_stride): (*mut f32, usize),
        accumulate: bool,
    ) {
        let mut sums = [[_mm512_setzero_ps(); NV]; R];
        // SAFETY: by contract, here and below.
        unsafe {
            if accumulate {
                for r in 0..R {
                    for v in 0..NV {
                        sums[r][v] = _mm512_loadu_ps(c.add(r * c_stride + v * LANES));
                    }
                }
            }
            let (mut a, mut b) = (a.add(steps.start * step), b.add(steps.start * b_stride));
            for _ in steps {
                let mut line = [_mm512_setzero_ps(); NV];
                for v in 0..NV {
                    line[v] = _mm512_loadu_ps(b.add(v * LANES));
                }
                each_row!(R, I => {
                    if ROW > 0 && I.is_multiple_of(2) {
                        for v in 0..NV {
                            multiply_add::<ROW, I>(a, line[v], &mut sums[I][v]);
                        }
                    } else {
                        let factor = _mm512_set1_ps(*a.add(I * if ROW > 0 { ROW } else { row }));
                        for v in 0..NV {
                            sums[I][v] = _mm512_fmadd_ps(factor, line[v], sums[I][v]);
                        }
                    }
                });
                (a, b) = (a.wrapping_add(step), b.wrapping_add(b_stride));
            }
            for r in 0..R {
                for v in 0..NV {
                    _mm512_storeu_ps(c.add(r * c_stride + v * LANES), sums[r][v]);
                }
            }
        }
    }
}

simd_fn! {
    /// [`multiply`] in tiles of four rows of one vector, which do not spill AVX2's registers.
    fn narrow(
        a: Left, rows: Range<usize>, b: Right, steps: Range<usize>, c: &mut [f32], c_stride: usize, columns: usize,
        accumulate: bool,
    ) = narrow_body;
}

#[inline(always)]
fn narrow_body<const FMA: bool>(
    a: Left,
    rows: Range<usize>,
    b: Right,
    steps: Range<usize>,
    c: &mut [f32],
    c_stride: usize,
    columns: usize,
    accumulate: bool,
) {
    const NARROW: usize = ROWS / 2;
    for row in rows.step_by(NARROW) {
        for column in (0..columns).step_by(LANES) {
            let at = |r: usize| (row + r) * c_stride + column;
            // Assigned a vector at a time: element by element, the compiler leaves them in memory.
            let mut sums = [[0.0; LANES]; NARROW];
            if accumulate {
                for r in 0..NARROW {
                    sums[r].copy_from_slice(&c[at(r)..][..LANES]);
                }
            }
            for t in steps.clone() {
                let line = &b.values[t * b.stride + column..][..LANES];
                for r in 0..NARROW {
                    let (factor, sum) = (a.values[(row + r) * a.row + t * a.step], sums[r]);
                    sums[r] = array::from_fn(|lane| fma::<FMA>(factor, line[lane], sum[lane]));
                }
            }
            for r in 0..NARROW {
                c[at(r)..][..LANES].copy_from_slice(&sums[r]);
            }
        }
    }
}
