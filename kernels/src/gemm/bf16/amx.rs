//! The innermost loop on tile registers (AMX), in assembly because stable Rust has no intrinsics for them.

use std::arch::asm;

use half::bf16;

use super::block::Ahead;
use super::pack::Tile;
use super::tile::Sums;
use crate::prefetch::prefetch_line_to_write;

/// Rows of A as tile loads find them; distances in bytes.
#[derive(Clone, Copy)]
pub(super) struct Lines {
    /// Row 0, first term.
    pub(super) start: *const bf16,
    /// From a row to the next, among 16.
    pub(super) stride: usize,
    /// From row 0 to row 16.
    pub(super) half: usize,
    /// From a step of 32 terms to the next.
    pub(super) step: usize,
}

impl Lines {
    /// Those of a panel.
    pub(super) fn packed(panel: &[Tile]) -> Self {
        Self { start: panel.as_ptr().cast(), stride: 64, half: size_of::<Tile>(), step: 2 * size_of::<Tile>() }
    }

    /// Those of a matrix whose rows are `stride` numbers apart.
    pub(super) fn in_place(start: *const bf16, stride: usize) -> Self {
        Self { start, stride: 2 * stride, half: 32 * stride, step: 64 }
    }
}

/// `sums = A·B` over whole steps of 32 terms, 32 × 32, or its first 16 rows if `rows` is no more.
///
/// # Safety
/// This thread must hold [`Tiles`](crate::amx::Tiles), and `a` have 32 rows, or 16 if `rows` is no more, of as many terms
/// as `b`.
pub(super) unsafe fn multiply(rows: usize, a: Lines, b: &[Tile], sums: &mut Sums, ahead: Ahead) {
    /// Steps that ask for lines, of four rows each: all at once would wait for one another.
    const ASKING: usize = 8;
    const ROWS: usize = 4;
    let steps = b.len() / 2;
    assert!(steps > 0 && b.len().is_multiple_of(2));
    // The last byte too: a row of C need not start with a cache line.
    let (mut start, mut end) = (ahead.start, ahead.start.wrapping_add(ahead.line.saturating_sub(1)));
    for _ in steps * ROWS..ASKING * ROWS {
        prefetch_line_to_write(start);
        prefetch_line_to_write(end);
        (start, end) = (start.wrapping_add(ahead.stride), end.wrapping_add(ahead.stride));
    }
    // A step's first tile of A is loaded while the step before still multiplies: on a core that serves two programs, loads
    // take longer than products. Beyond the steps that ask for lines it was measured to gain nothing.
    //
    // SAFETY: each step reads two tiles of A, which the caller vouches for, and of B; `sums` holds 32 rows of 128 bytes.
    unsafe {
        if rows > 16 {
            asm!(
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                "tileloadd tmm4, [{a} + {stride}*1]",
                "2:",
                "tileloadd tmm6, [{b} + {line}*1]",
                "tileloadd tmm7, [{b} + {line}*1 + 1024]",
                "tileloadd tmm5, [{second} + {stride}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "prefetchw [{ahead}]", "prefetchw [{ahead} + {pace}]",
                "prefetchw [{end}]", "prefetchw [{end} + {pace}]",
                "lea {ahead}, [{ahead} + 2*{pace}]", "lea {end}, [{end} + 2*{pace}]",
                "prefetchw [{ahead}]", "prefetchw [{ahead} + {pace}]",
                "prefetchw [{end}]", "prefetchw [{end} + {pace}]",
                "lea {ahead}, [{ahead} + 2*{pace}]", "lea {end}, [{end} + 2*{pace}]",
                "add {a}, {step}", "add {second}, {step}", "add {b}, 2048", "dec {steps}", "jz 4f",
                "tileloadd tmm4, [{a} + {stride}*1]",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "dec {asking}", "jnz 2b",
                "3:",
                "tileloadd tmm6, [{b} + {line}*1]",
                "tileloadd tmm7, [{b} + {line}*1 + 1024]",
                "tileloadd tmm5, [{second} + {stride}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a}, {step}", "add {second}, {step}", "add {b}, 2048", "dec {steps}", "jz 5f",
                "tileloadd tmm4, [{a} + {stride}*1]",
                "jmp 3b",
                "4:",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "5:",
                "tilestored [{c} + {line}*2], tmm0",
                "tilestored [{c} + {line}*2 + 64], tmm1",
                "tilestored [{c} + {line}*2 + 2048], tmm2",
                "tilestored [{c} + {line}*2 + 2112], tmm3",
                a = inout(reg) a.start => _, second = inout(reg) a.start.byte_add(a.half) => _,
                b = inout(reg) b.as_ptr() => _,
                asking = inout(reg) ASKING => _, steps = inout(reg) steps => _,
                ahead = inout(reg) start => _, end = inout(reg) end => _, pace = in(reg) ahead.stride,
                stride = in(reg) a.stride, step = in(reg) a.step,
                c = in(reg) sums.0.as_mut_ptr(), line = in(reg) 64usize,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        } else {
            asm!(
                "tilezero tmm0", "tilezero tmm1",
                "2:",
                "tileloadd tmm4, [{a} + {stride}*1]",
                "tileloadd tmm6, [{b} + {line}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b} + {line}*1 + 1024]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "add {a}, {step}", "add {b}, 2048", "dec {steps}", "jnz 2b",
                "tilestored [{c} + {line}*2], tmm0",
                "tilestored [{c} + {line}*2 + 64], tmm1",
                a = inout(reg) a.start => _, b = inout(reg) b.as_ptr() => _, steps = inout(reg) steps => _,
                stride = in(reg) a.stride, step = in(reg) a.step,
                c = in(reg) sums.0.as_mut_ptr(), line = in(reg) 64usize,
                out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}
