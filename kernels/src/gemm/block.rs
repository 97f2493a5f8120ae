//! Tiling and threads: cuts the output into tasks that one thread computes from start to end.

use std::cell::RefCell;

use rayon::prelude::*;

use super::K_BLOCK;
use super::few::few_rows;
use super::micro::{MicroKernel, micro_kernel};
use super::output::Output;
use super::pack::pack_b;
use super::task::run_task;
use crate::room::Room;

/// The right operand of a product.
#[derive(Clone, Copy)]
pub(crate) enum Right<'a> {
    /// Its elements, with the distances from one `k` to the next and from one column to the next.
    Strided(&'a [f32], (usize, usize)),
    /// [`pack_panels`] of all columns over all of `k`, for this kernel.
    Packed(&'a [f32], MicroKernel),
}

/// A right operand that is packed for several products, and its memory, which is used again.
#[derive(Default)]
pub(crate) struct PackedRight {
    panels: Room,
    kernel: Option<MicroKernel>,
}

impl PackedRight {
    /// Packs `k` terms of `columns` columns, given their strides.
    pub(crate) fn fill(&mut self, b: &[f32], strides: (usize, usize), columns: usize, k: usize) {
        let kernel = micro_kernel();
        let panels = self.panels.first(columns.next_multiple_of(kernel.columns) * k);
        pack_panels(b, strides, columns, k, &kernel, panels);
        self.kernel = Some(kernel);
    }

    /// What was packed last.
    ///
    /// # Panics
    /// If nothing was.
    pub(crate) fn right(&self) -> Right<'_> {
        Right::Packed(&self.panels, self.kernel.expect("a packed operand"))
    }
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

/// Largest rows of C in one task: its A (240 KiB) stays in L2.
const TASK_ROWS: usize = 240;
/// Largest columns of C in one task: a block of B (1 MiB) stays in L2 while all rows of the task pass by.
const TASK_COLUMNS: usize = 1024;
/// The same where both operands lie in place, and their next blocks of terms come near while one is worked on.
const TASK_ROWS_IN_PLACE: usize = 192;
const TASK_COLUMNS_IN_PLACE: usize = 384;
/// Elements of B that are packed before the tasks start (4 MiB).
const PACKED_B: usize = 1 << 20;
/// With few rows B is read once or twice, so a task packs its own, and a panel that stays in L1 is enough.
const FEW_ROWS: usize = 32;
const FEW_ROWS_COLUMNS: usize = 64;
/// From here on it is rows, not columns, that are dealt out to more tasks.
const MANY_ROWS: usize = 128;
/// Below this many multiply-adds a fork costs more than it saves.
const SERIAL_BELOW: usize = 1 << 17;

/// A rectangle of C.
#[derive(Clone, Copy)]
pub(super) struct Task {
    pub(super) row: usize,
    pub(super) rows: usize,
    pub(super) column: usize,
    pub(super) columns: usize,
}

/// The columns and the terms of B that are at hand.
#[derive(Clone, Copy)]
pub(super) struct Part<'a> {
    /// The first column, and how many.
    pub(super) columns: (usize, usize),
    /// The first term, and how many.
    pub(super) k: (usize, usize),
    pub(super) b: At<'a>,
}

/// Where tasks find B.
#[derive(Clone, Copy)]
pub(super) enum At<'a> {
    /// [`pack_panels`] of this part.
    Panels(&'a [f32]),
    /// In place, so many elements from a term to the next, the columns side by side.
    InPlace(usize),
    /// Nowhere: each packs what it needs.
    Nowhere,
}

thread_local! {
    /// A panel of A, and panels of B, of a task.
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
    match g.b {
        Right::Packed(panels, kernel) => {
            assert!(panels.len() == g.n.next_multiple_of(kernel.columns) * g.k, "gemm: length of the packed B");
            if !few_rows(&g, panels, &kernel) {
                run_part(&g, &kernel, Part { columns: (0, g.n), k: (0, g.k), b: At::Panels(panels) });
            }
        }
        Right::Strided(b, strides) => {
            assert!(b.len() > (g.k - 1) * strides.0 + (g.n - 1) * strides.1, "gemm: B is too short");
            strided(&g, b, strides);
        }
    }
}

/// The product with a B that was packed before, on this thread alone.
///
/// # Panics
/// As [`gemm`], and if B was not packed.
pub(crate) fn gemm_here(g: Gemm<'_>) {
    let Right::Packed(panels, kernel) = g.b else { panic!("gemm: right operand that is not packed") };
    assert!(g.m > 0 && g.n > 0 && g.k > 0, "gemm: nothing to compute");
    assert!(g.c.len() >= (g.m - 1) * g.c_row_stride + g.n && g.c_row_stride >= g.n, "gemm: C is too short");
    assert!(g.a.len() > (g.m - 1) * g.a_row_stride + (g.k - 1) * g.a_col_stride, "gemm: A is too short");
    assert!(panels.len() == g.n.next_multiple_of(kernel.columns) * g.k, "gemm: length of the packed B");
    let part = Part { columns: (0, g.n), k: (0, g.k), b: At::Panels(panels) };
    for task in tasks(g.m, g.n, &kernel, 1) {
        OPERANDS.with_borrow_mut(|(a, b)| run_task(&g, &kernel, &part, &task, None, a, b));
    }
}

/// The product with a B that was not packed before.
fn strided(g: &Gemm<'_>, b: &[f32], strides: (usize, usize)) {
    let kernel = micro_kernel();
    let at = match strides {
        _ if g.m <= FEW_ROWS => At::Nowhere,
        // A sum over rows of both operands: few rows of C for each element of B, which lies in the order of the kernel.
        (stride, 1) if g.a_row_stride == 1 && g.a_col_stride > 1 => At::InPlace(stride),
        _ => return packed_first(g, b, strides, &kernel),
    };
    run_part(g, &kernel, Part { columns: (0, g.n), k: (0, g.k), b: at });
}

/// The product with B packed for all tasks, as much of it at a time as caches hold.
fn packed_first(g: &Gemm<'_>, b: &[f32], strides: (usize, usize), kernel: &MicroKernel) {
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
            pack_panels(b, strides, columns, kc, kernel, packed);
            run_part(g, kernel, Part { columns: (column, columns), k: (k0, kc), b: At::Panels(packed) });
        }
    }
    SHARED.set(room);
}

/// The size of the fewest nearly equal parts of `n`, none larger than `most`, in multiples of `unit`.
fn even(n: usize, most: usize, unit: usize) -> usize {
    n.div_ceil(n.div_ceil(most)).next_multiple_of(unit)
}

/// Packs `k × columns` of B: panels of some columns with all of `k`, one after another.
pub(super) fn pack_panels(
    b: &[f32],
    strides: (usize, usize),
    columns: usize,
    k: usize,
    kernel: &MicroKernel,
    packed: &mut [f32],
) {
    if k == 0 {
        return;
    }
    let nr = kernel.columns;
    let pack = |(index, panel): (usize, &mut [f32])| {
        let (column, k0) = (index / k.div_ceil(K_BLOCK) * nr, index % k.div_ceil(K_BLOCK) * K_BLOCK);
        let (source, width) = (&b[k0 * strides.0 + column * strides.1..], nr.min(columns - column));
        pack_b(source, strides, width, panel.len() / nr, nr, panel);
    };
    if columns * k < SERIAL_BELOW {
        packed.chunks_mut(nr * k).flat_map(|panel| panel.chunks_mut(nr * K_BLOCK)).enumerate().for_each(pack);
    } else {
        let blocks: Vec<_> =
            packed.chunks_mut(nr * k).flat_map(|panel| panel.chunks_mut(nr * K_BLOCK)).enumerate().collect();
        blocks.into_par_iter().with_max_len(4).for_each(pack);
    }
}

/// The columns of B one after the other, from what [`pack_panels`] has written.
pub(super) fn unpack_panels(packed: &[f32], columns: usize, k: usize, kernel: &MicroKernel) -> Vec<f32> {
    let nr = kernel.columns;
    let mut b = vec![0.0; columns * k];
    // Of no terms there are no elements, and any length of a panel will do.
    let pitch = (nr * k).max(1);
    for (b, panel) in b.chunks_mut(pitch).zip(packed.chunks_exact(pitch)) {
        for (of, column) in b.chunks_exact_mut(k).enumerate() {
            column.iter_mut().zip(panel.chunks_exact(nr)).for_each(|(value, line)| *value = line[of]);
        }
    }
    b
}

/// Adds what a part of B contributes to C.
fn run_part(g: &Gemm<'_>, kernel: &MicroKernel, part: Part<'_>) {
    let (column, columns) = part.columns;
    let threads = rayon::current_num_threads();
    let tasks = match part.b {
        At::InPlace(_) => tasks_in_place(g.m, columns, kernel, threads),
        _ => tasks(g.m, columns, kernel, threads),
    };
    let task = |index: usize| tasks.get(index).map(|task| Task { column: column + task.column, ..*task });
    let run = |index: usize| {
        if let Some(now) = task(index) {
            // The one that this thread most likely comes to then.
            let next = task(index + 1);
            OPERANDS.with_borrow_mut(|(a, b)| run_task(g, kernel, &part, &now, next.as_ref(), a, b));
        }
    };
    if tasks.len() == 1 || g.m * columns * part.k.1 < SERIAL_BELOW {
        (0..tasks.len()).for_each(run);
    } else {
        // Each can be taken by itself: cores may differ in speed.
        (0..tasks.len()).into_par_iter().with_max_len(1).for_each(run);
    }
}

/// Cuts rows and columns into rectangles, a few per thread, aligned to the micro-kernel.
fn tasks(m: usize, n: usize, kernel: &MicroKernel, threads: usize) -> Vec<Task> {
    // Where one thread does it all, more tasks only pack more.
    let wanted = if threads == 1 { 1 } else { 8 * threads };
    let mut rows = even(m, TASK_ROWS, kernel.rows);
    let mut columns = even(n, if m <= FEW_ROWS { FEW_ROWS_COLUMNS } else { TASK_COLUMNS }, kernel.columns);
    let fewest = 2 * kernel.rows;
    while m.div_ceil(rows) * n.div_ceil(columns) < wanted {
        if m >= MANY_ROWS && rows > fewest {
            rows = (rows / 2).next_multiple_of(kernel.rows).max(fewest);
        } else if columns > kernel.columns {
            columns = (columns / 2).next_multiple_of(kernel.columns);
        } else if rows > fewest {
            rows = (rows / 2).next_multiple_of(kernel.rows).max(fewest);
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

/// Cuts rows and columns where both operands come from far away for each task anew: into a few nearly equal tasks per
/// thread, in the way in which they read least.
fn tasks_in_place(m: usize, n: usize, kernel: &MicroKernel, threads: usize) -> Vec<Task> {
    let wanted = if threads == 1 { 1 } else { 4 * threads };
    let (row_units, column_units) = (m.div_ceil(kernel.rows), n.div_ceil(kernel.columns));
    // No fewer than three tiles of rows, of which the first finds B as it lies, and two of columns, unless there are none.
    let (fewest_rows, fewest_columns) = (m.div_ceil(TASK_ROWS_IN_PLACE), n.div_ceil(TASK_COLUMNS_IN_PLACE));
    let most_rows = row_units.div_ceil(3).max(fewest_rows);
    let most_columns = column_units.div_ceil(2).max(fewest_columns);
    let cuts = (fewest_rows..=most_rows).map(|rows| {
        let columns = wanted.div_ceil(rows).clamp(fewest_columns, most_columns);
        (m * columns + n * rows, rows, columns)
    });
    let is_enough = |&(_, rows, columns): &(usize, usize, usize)| rows * columns >= wanted || rows == most_rows;
    let (_, rows, columns) = cuts.filter(is_enough).min().unwrap_or((0, fewest_rows, fewest_columns));
    let part = |index: usize, parts: usize, (all, units, unit): (usize, usize, usize)| {
        let at = |index: usize| all.min(units * index / parts * unit);
        (at(index), at(index + 1) - at(index))
    };
    let mut tasks = Vec::with_capacity(rows * columns);
    for index in 0..rows * columns {
        let (row, rows) = part(index / columns, rows, (m, row_units, kernel.rows));
        let (column, columns) = part(index % columns, columns, (n, column_units, kernel.columns));
        tasks.push(Task { row, rows, column, columns });
    }
    tasks
}
