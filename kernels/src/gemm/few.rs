//! Few rows times a packed B: each panel of B comes from far away, is read once, and used for all rows while it is near.

use rayon::prelude::*;

use super::K_BLOCK;
use super::block::Gemm;
use super::micro::MicroKernel;

/// Up to this many rows.
const FEW_ROWS: usize = 32;

/// Computes the product if there is a kernel for it; says whether.
pub(super) fn few_rows(g: &Gemm<'_>, panels: &[f32], kernel: &MicroKernel) -> bool {
    #[cfg(target_arch = "x86_64")]
    if kernel.has_few && g.m <= FEW_ROWS && g.a_col_stride == 1 {
        wide::multiply(g, panels);
        return true;
    }
    let _ = (g, panels, kernel);
    false
}

#[cfg(target_arch = "x86_64")]
mod wide {
    use std::cell::RefCell;

    use super::super::avx512::{COLUMNS, Chain, ROWS, chain};
    use super::super::pack::transpose;
    use super::*;
    use crate::room::Room;

    /// Terms that all rows go over before the next: their part of a panel, 8 KiB, stays in L1.
    const TERMS: usize = 64;
    /// Tasks for each thread: cores may differ in speed, and who is early takes from who is late.
    const TASKS_PER_THREAD: usize = 4;
    /// Below this many multiply-adds a fork costs more than it saves.
    const SERIAL_BELOW: usize = 1 << 17;

    thread_local! {
        /// A, for all tasks of a product.
        static SHARED: RefCell<Room> = RefCell::default();
    }

    pub(super) fn multiply(g: &Gemm<'_>, panels: &[f32]) {
        let groups = g.m.div_ceil(ROWS);
        let height = g.m.div_ceil(groups);
        // Taken out, not borrowed: while this thread waits for others, it may be given another product.
        let mut room = SHARED.take();
        let a = room.first(g.m * g.k);
        for (group, panel) in a.chunks_mut(height * g.k).enumerate() {
            let rows = panel.len() / g.k;
            transpose(&g.a[group * height * g.a_row_stride..], g.a_row_stride, rows, g.k, rows, panel);
        }
        let a: &[f32] = a;
        let columns = g.n.div_ceil(COLUMNS);
        let each = columns.div_ceil(TASKS_PER_THREAD * rayon::current_num_threads());
        let task = |first: usize| {
            let mut sums = [0f32; FEW_ROWS * COLUMNS];
            for panel in first..columns.min(first + each) {
                one_panel(g, a, height, &panels[panel * COLUMNS * g.k..][..COLUMNS * g.k], panel * COLUMNS, &mut sums);
            }
        };
        if each == columns || g.m * g.n * g.k < SERIAL_BELOW {
            (0..columns).step_by(each).for_each(task);
        } else {
            (0..columns.div_ceil(each)).into_par_iter().with_max_len(1).for_each(|index| task(index * each));
        }
        SHARED.set(room);
    }

    /// All rows times one panel, of the columns of C from `column` on. Of each block of terms the sums are one chain, laid
    /// aside while the other rows take their turn.
    fn one_panel(g: &Gemm<'_>, a: &[f32], height: usize, b: &[f32], column: usize, sums: &mut [f32]) {
        let columns = COLUMNS.min(g.n - column);
        let at_once = if g.m > ROWS { TERMS } else { K_BLOCK };
        for term in (0..g.k).step_by(at_once) {
            let terms = at_once.min(g.k - term);
            let end = term + terms;
            let b = &b[term * COLUMNS..end * COLUMNS];
            let is_end = end == g.k || end.is_multiple_of(K_BLOCK);
            for (group, (a, sums)) in a.chunks(height * g.k).zip(sums.chunks_mut(height * COLUMNS)).enumerate() {
                let rows = a.len() / g.k;
                let c = g.c.start().wrapping_add(group * height * g.c_row_stride + column);
                let chained = Chain {
                    rows,
                    group,
                    groups: g.m.div_ceil(height),
                    is_start: term.is_multiple_of(K_BLOCK),
                    c: is_end.then_some((c, columns)),
                    c_stride: g.c_row_stride,
                    accumulate: g.accumulate || term >= K_BLOCK,
                };
                // SAFETY: AVX-512 is active, for which B was packed; the rectangle lies inside C, and no other task writes it.
                unsafe { chain(&chained, &a[term * rows..end * rows], b, sums) };
            }
        }
    }
}
