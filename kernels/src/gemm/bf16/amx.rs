//! The innermost loop on tile registers (AMX), in assembly because stable Rust has no intrinsics for them.

use std::arch::asm;

use super::pack::Tile;
use super::tile::Sums;

/// `sums = A·B` over whole steps of 32 terms, 32 × 32, or its first 16 rows if `rows` is no more.
///
/// # Safety
/// This thread must hold [`Tiles`](crate::amx::Tiles).
pub(super) unsafe fn multiply(rows: usize, a: &[Tile], b: &[Tile], sums: &mut Sums) {
    let steps = a.len() / 2;
    assert!(steps > 0 && b.len() == a.len());
    // SAFETY: each step reads two tiles of A and of B, whose number was just checked; `sums` holds 32 rows of 128 bytes.
    unsafe {
        if rows > 16 {
            asm!(
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                "2:",
                "tileloadd tmm4, [{a} + {line}*1]",
                "tileloadd tmm6, [{b} + {line}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b} + {line}*1 + 1024]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{a} + {line}*1 + 1024]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a}, 2048", "add {b}, 2048", "dec {steps}", "jnz 2b",
                "tilestored [{c} + {pitch}*1], tmm0",
                "tilestored [{c} + {pitch}*1 + 64], tmm1",
                "tilestored [{c} + {pitch}*1 + 2048], tmm2",
                "tilestored [{c} + {pitch}*1 + 2112], tmm3",
                a = inout(reg) a.as_ptr() => _, b = inout(reg) b.as_ptr() => _, steps = inout(reg) steps => _,
                c = in(reg) sums.0.as_mut_ptr(), line = in(reg) 64usize, pitch = in(reg) 128usize,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        } else {
            asm!(
                "tilezero tmm0", "tilezero tmm1",
                "2:",
                "tileloadd tmm4, [{a} + {line}*1]",
                "tileloadd tmm6, [{b} + {line}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b} + {line}*1 + 1024]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "add {a}, 2048", "add {b}, 2048", "dec {steps}", "jnz 2b",
                "tilestored [{c} + {pitch}*1], tmm0",
                "tilestored [{c} + {pitch}*1 + 64], tmm1",
                a = inout(reg) a.as_ptr() => _, b = inout(reg) b.as_ptr() => _, steps = inout(reg) steps => _,
                c = in(reg) sums.0.as_mut_ptr(), line = in(reg) 64usize, pitch = in(reg) 128usize,
                out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}
