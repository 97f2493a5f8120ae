//! Tiling and threads: cuts the output into tasks that one thread computes from start to end.

use std::cell::RefCell;

use rayon::prelude::*;

use super::K_BLOCK;
use super::micro::{MicroKernel, micro_kernel};
use super::output::Output;
use super::pack::{pack_a, pack_b};
use crate::room::Room;

/// The right operand of a product.
#[derive(Clone, Copy)]
pub(crate) enum Right<'a> {
    /// Its elements, with the distances from one `k` to the next and from one column to the next.
    Strided(&'a [f32], (usize, usize)),
    /// [`pack_blocks`] of all columns over all of `k`, for this kernel.
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

/// Largest rows of C in one task: its packed A (240 KiB) stays in L2.
const TASK_ROWS: usize = 240;
/// Largest columns of C in one task: a block of packed B (1 MiB) stays in L2 while all rows of the task pass by.
const TASK_COLUMNS: usize = 1024;
/// Elements of B that are packed before the tasks start (4 MiB).
const PACKED_B: usize = 1 << 20;
/// With few rows B is read once or twice, so a task packs its own, and a panel that stays in L1 is enough.
const FEW_ROWS: usize = 32;
const FEW_ROWS_COLUMNS: usize = 64;
/// From here on it is rows, not columns, that are dealt out to more tasks.
const MANY_ROWS: usize = 128;
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

/// The columns and the terms of B that are at hand.
#[derive(Clone, Copy)]
struct Part<'a> {
    columns: (usize, usize),
    k: (usize, usize),
    /// [`pack_blocks`] of this part; or all of B, of which tasks pack what they need.
    b: Right<'a>,
}

thread_local! {
    /// A and B of a task.
    static OPERANDS: RefCell<(Room, Room)> = RefCell::default();
    /// B for all tasks of a product.
    static SHARED: RefCell<Room> = RefCell::default();
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
    let c = Target { c: &g.c, row_stride: g.c_row_stride, accumulate: g.accumulate };
    match g.b {
        Right::Strided(b, strides) if g.m > FEW_ROWS => {
            // Taken out, not borrowed: while this thread waits for others, it may be given another product.
            let mut room = SHARED.take();
            let columns = even(g.n, TASK_COLUMNS, kernel.columns);
            let terms = PACKED_B / columns / K_BLOCK * K_BLOCK;
            for column in (0..g.n).step_by(columns) {
                let columns = columns.min(g.n - column);
                for k0 in (0..g.k).step_by(terms) {
                    let kc = terms.min(g.k - k0);
                    let b = &b[k0 * strides.0 + column * strides.1..];
                    let packed = room.first(columns.next_multiple_of(kernel.columns) * kc);
                    pack_blocks(b, strides, columns, kc, &kernel, packed);
                    let b = Right::Packed(packed, kernel);
                    let part = Part { columns: (column, columns), k: (k0, kc), b };
                    run_part(&g, &kernel, c, part);
                }
            }
            SHARED.set(room);
        }
        b => run_part(&g, &kernel, c, Part { columns: (0, g.n), k: (0, g.k), b }),
    }
}

/// The size of the fewest nearly equal parts of `n`, none larger than `most`, in multiples of `unit`.
fn even(n: usize, most: usize, unit: usize) -> usize {
    n.div_ceil(n.div_ceil(most)).next_multiple_of(unit)
}

/// Packs `k × columns` of B: the blocks of [`K_BLOCK`] terms one after another, each as panels of all columns.
pub(super) fn pack_blocks(
    b: &[f32],
    strides: (usize, usize),
    columns: usize,
    k: usize,
    kernel: &MicroKernel,
    packed: &mut [f32],
) {
    let nr = kernel.columns;
    let mut panels = Vec::new();
    let mut rest = packed;
    for k0 in (0..k).step_by(K_BLOCK) {
        let kc = K_BLOCK.min(k - k0);
        for column in (0..columns).step_by(nr) {
            let (panel, tail) = rest.split_at_mut(nr * kc);
            panels.push((k0, column, panel));
            rest = tail;
        }
    }
    let pack = |(k0, column, panel): (usize, usize, &mut [f32])| {
        let (source, width) = (&b[k0 * strides.0 + column * strides.1..], nr.min(columns - column));
        pack_b(source, strides, width, panel.len() / nr, nr, panel);
    };
    if columns * k < SERIAL_BELOW {
        panels.into_iter().for_each(pack);
    } else {
        panels.into_par_iter().with_max_len(4).for_each(pack);
    }
}

/// The columns of B one after the other, from what [`pack_blocks`] has written.
pub(super) fn unpack_blocks(packed: &[f32], columns: usize, k: usize, kernel: &MicroKernel) -> Vec<f32> {
    let nr = kernel.columns;
    let mut b = vec![0.0; columns * k];
    let mut rest = packed;
    for k0 in (0..k).step_by(K_BLOCK) {
        let kc = K_BLOCK.min(k - k0);
        for column in (0..columns).step_by(nr) {
            let (panel, tail) = rest.split_at(nr * kc);
            rest = tail;
            for (term, line) in panel.chunks_exact(nr).enumerate() {
                for (of, value) in line.iter().take(columns - column).enumerate() {
                    b[(column + of) * k + k0 + term] = *value;
                }
            }
        }
    }
    b
}

/// Adds what a part of B contributes to C.
fn run_part(g: &Gemm<'_>, kernel: &MicroKernel, c: Target<'_>, part: Part<'_>) {
    let (column, columns) = part.columns;
    let tasks = tasks(g.m, columns, kernel);
    let run = |task: &Task| {
        let task = Task { column: column + task.column, ..*task };
        OPERANDS.with_borrow_mut(|(a, b)| run_task(g, kernel, &part, &task, c, a, b));
    };
    if tasks.len() == 1 || g.m * columns * part.k.1 < SERIAL_BELOW {
        tasks.iter().for_each(run);
    } else {
        // Each can be taken by itself: cores may differ in speed.
        tasks.par_iter().with_max_len(1).for_each(run);
    }
}

/// Cuts rows and columns into rectangles, a few per thread, aligned to the micro-kernel.
fn tasks(m: usize, n: usize, kernel: &MicroKernel) -> Vec<Task> {
    let threads = rayon::current_num_threads();
    // Where one thread does it all, more tasks only pack more.
    let wanted = if threads == 1 { 1 } else { 8 * threads };
    let mut rows = even(m, TASK_ROWS, kernel.rows);
    let mut columns = even(n, if m <= FEW_ROWS { FEW_ROWS_COLUMNS } else { TASK_COLUMNS }, kernel.columns);
    while m.div_ceil(rows) * n.div_ceil(columns) < wanted {
        if m >= MANY_ROWS && rows > 2 * kernel.rows {
            rows = (rows / 2).next_multiple_of(kernel.rows);
        } else if columns > kernel.columns {
            columns = (columns / 2).next_multiple_of(kernel.columns);
        } else if rows > 2 * kernel.rows {
            rows = (rows / 2).next_multiple_of(kernel.rows);
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

/// A panel of A stays in L1 while the panels of B pass by: a row of tiles of C is written from left to right.
fn run_task(
    g: &Gemm<'_>,
    kernel: &MicroKernel,
    part: &Part<'_>,
    t: &Task,
    c: Target<'_>,
    a_room: &mut Room,
    b_room: &mut Room,
) {
    let (mr, nr) = (kernel.rows, kernel.columns);
    let width = part.columns.1.next_multiple_of(nr);
    let (first_k, terms) = part.k;
    for k0 in (0..terms).step_by(K_BLOCK) {
        let kc = K_BLOCK.min(terms - k0);
        let accumulate = c.accumulate || first_k + k0 > 0;
        let a_packed = a_room.first(t.rows * kc);
        let a = &g.a[t.row * g.a_row_stride + (first_k + k0) * g.a_col_stride..];
        pack_a(a, (g.a_row_stride, g.a_col_stride), t.rows, kc, mr, a_packed);
        let b_packed = match part.b {
            Right::Packed(packed, _) => &packed[k0 * width + (t.column - part.columns.0) * kc..],
            Right::Strided(b, strides) => {
                let packed = b_room.first(t.columns.next_multiple_of(nr) * kc);
                let b = &b[(first_k + k0) * strides.0 + t.column * strides.1..];
                pack_b(b, strides, t.columns, kc, nr, packed);
                packed
            }
        };
        for row in (0..t.rows).step_by(mr) {
            let rows = mr.min(t.rows - row);
            let a = &a_packed[row * kc..row * kc + rows * kc];
            for column in (0..t.columns).step_by(nr) {
                let columns = nr.min(t.columns - column);
                let b = &b_packed[column * kc..][..nr * kc];
                // SAFETY: the rectangle lies inside C (checked in `gemm`), and no other task writes it.
                unsafe {
                    let corner = c.c.start().add((t.row + row) * c.row_stride + t.column + column);
                    (kernel.run)(rows, columns, kc, a, b, corner, c.row_stride, accumulate);
                }
            }
        }
    }
}
