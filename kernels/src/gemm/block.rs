//! Tiling and threads: cuts the output into tasks that one thread computes from start to end.

use std::cell::RefCell;

use rayon::prelude::*;

use super::K_BLOCK;
use super::micro::{MicroKernel, micro_kernel};
use super::output::Output;
use super::pack::{pack_a, pack_b};

/// The right operand of a product.
#[derive(Clone, Copy)]
pub(crate) enum Right<'a> {
    /// Its elements, with the distances from one `k` to the next and from one column to the next.
    Strided(&'a [f32], (usize, usize)),
    /// Panels of all columns over all of `k`, packed for this kernel.
    Packed(&'a [f32], MicroKernel),
}

/// `C[m, n] (+)= A[m, k] · B[k, n]` on strided slices.
pub(crate) struct Gemm<'a> {
    /// Rows of C.
    pub(crate) m: usize,
    /// Columns of C.
    pub(crate) n: usize,
    /// Terms of each dot product.
    pub(crate) k: usize,
    /// Elements of A.
    pub(crate) a: &'a [f32],
    /// Distance in A from one row to the next.
    pub(crate) a_row_stride: usize,
    /// Distance in A from one `k` to the next.
    pub(crate) a_col_stride: usize,
    /// B.
    pub(crate) b: Right<'a>,
    /// Elements of C, each row contiguous.
    pub(crate) c: Output<'a, f32>,
    /// Distance in C from one row to the next.
    pub(crate) c_row_stride: usize,
    /// Add to C instead of overwriting it.
    pub(crate) accumulate: bool,
}

/// Largest rows and columns of C in one task: its packed A (480 KiB) and B (512 KiB) share a 2 MiB L2.
const TASK_ROWS: usize = 480;
const TASK_COLUMNS: usize = 512;
/// With few rows B is read once: a panel that stays in L1 is enough.
const FEW_ROWS: usize = 32;
const FEW_ROWS_COLUMNS: usize = 64;
/// Below this many multiply-adds a fork costs more than it saves.
const SERIAL_BELOW: usize = 1 << 17;

/// C, as a task writes a rectangle of it.
#[derive(Clone, Copy)]
struct Target<'a> {
    c: &'a Output<'a, f32>,
    row_stride: usize,
    accumulate: bool,
}

/// A rectangle of C.
#[derive(Clone, Copy)]
struct Task {
    row: usize,
    rows: usize,
    column: usize,
    columns: usize,
}

thread_local! {
    static PACKED: RefCell<(Vec<f32>, Vec<f32>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

/// Computes the product; see the module for the order of arithmetic.
///
/// # Panics
/// If a slice is too short for its strides (a bug of the caller: public kernels check shapes first).
pub(crate) fn gemm(g: Gemm<'_>) {
    if g.m == 0 || g.n == 0 {
        return;
    }
    assert!(g.c.len() >= (g.m - 1) * g.c_row_stride + g.n && g.c_row_stride >= g.n, "gemm: C is too short");
    if g.k == 0 {
        if !g.accumulate {
            for row in 0..g.m {
                // SAFETY: C holds these rows; any bytes make an f32, and zero bytes make zero.
                unsafe { g.c.start().add(row * g.c_row_stride).write_bytes(0, g.n) };
            }
        }
        return;
    }
    assert!(g.a.len() > (g.m - 1) * g.a_row_stride + (g.k - 1) * g.a_col_stride, "gemm: A is too short");
    let kernel = match g.b {
        Right::Strided(b, strides) => {
            assert!(b.len() > (g.k - 1) * strides.0 + (g.n - 1) * strides.1, "gemm: B is too short");
            micro_kernel()
        }
        Right::Packed(b, kernel) => {
            assert!(b.len() == g.n.next_multiple_of(kernel.columns) * g.k, "gemm: length of the packed B");
            kernel
        }
    };
    let tasks = tasks(g.m, g.n, &kernel);
    let c = Target { c: &g.c, row_stride: g.c_row_stride, accumulate: g.accumulate };
    let run = |task: &Task| {
        PACKED.with_borrow_mut(|(a, b)| run_task(&g, &kernel, task, c, a, b));
    };
    if tasks.len() == 1 || g.m * g.n * g.k < SERIAL_BELOW {
        tasks.iter().for_each(run);
    } else {
        tasks.par_iter().for_each(run);
    }
}

/// Cuts C into rectangles, a few per thread, aligned to the micro-kernel.
fn tasks(m: usize, n: usize, kernel: &MicroKernel) -> Vec<Task> {
    let wanted = 2 * rayon::current_num_threads();
    let mut rows = TASK_ROWS.min(m.next_multiple_of(kernel.rows));
    let mut columns =
        if m <= FEW_ROWS { FEW_ROWS_COLUMNS } else { TASK_COLUMNS }.min(n.next_multiple_of(kernel.columns));
    // Halve the longer side until there is work for everyone; small tiles pack too much for what they compute.
    while m.div_ceil(rows) * n.div_ceil(columns) < wanted {
        if columns > 4 * kernel.columns && columns >= rows {
            columns = (columns / 2).next_multiple_of(kernel.columns);
        } else if rows > 8 * kernel.rows {
            rows = (rows / 2).next_multiple_of(kernel.rows);
        } else if columns > kernel.columns {
            columns = (columns / 2).next_multiple_of(kernel.columns);
        } else {
            break;
        }
    }
    let mut tasks = Vec::with_capacity(m.div_ceil(rows) * n.div_ceil(columns));
    for row in (0..m).step_by(rows) {
        for column in (0..n).step_by(columns) {
            tasks.push(Task { row, rows: rows.min(m - row), column, columns: columns.min(n - column) });
        }
    }
    tasks
}

fn run_task(
    g: &Gemm<'_>,
    kernel: &MicroKernel,
    t: &Task,
    c: Target<'_>,
    a_packed: &mut Vec<f32>,
    b_packed: &mut Vec<f32>,
) {
    let (mr, nr) = (kernel.rows, kernel.columns);
    for k0 in (0..g.k).step_by(K_BLOCK) {
        let kc = K_BLOCK.min(g.k - k0);
        let accumulate = c.accumulate || k0 > 0;
        let a = &g.a[t.row * g.a_row_stride + k0 * g.a_col_stride..];
        pack_a(a, (g.a_row_stride, g.a_col_stride), t.rows, kc, mr, a_packed);
        if let Right::Strided(b, strides) = g.b {
            b_packed.resize(t.columns.next_multiple_of(nr) * kc, 0.0);
            pack_b(&b[k0 * strides.0 + t.column * strides.1..], strides, t.columns, kc, nr, b_packed);
        }
        for column in (0..t.columns).step_by(nr) {
            let columns = nr.min(t.columns - column);
            let b = match g.b {
                Right::Strided(..) => &b_packed[column * kc..][..nr * kc],
                Right::Packed(b, _) => &b[(t.column + column) * g.k + k0 * nr..][..nr * kc],
            };
            for row in (0..t.rows).step_by(mr) {
                let rows = mr.min(t.rows - row);
                let a = &a_packed[row * kc..row * kc + rows * kc];
                // SAFETY: the rectangle lies inside C (checked in `gemm`), and no other task writes it.
                unsafe {
                    let corner = c.c.start().add((t.row + row) * c.row_stride + t.column + column);
                    (kernel.run)(rows, columns, kc, a, b, corner, c.row_stride, accumulate);
                }
            }
        }
    }
}
