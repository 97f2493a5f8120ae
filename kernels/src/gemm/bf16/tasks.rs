//! Tiling and threads of the bf16 products.

use std::cell::Cell;
use std::ops::Range;

use rayon::prelude::*;

use super::block::{Block, Left};
use super::pack::{LINES, Operand, Side, Tile, pack_lines, pack_panel, panel_tiles};
use super::tile::Stored;
use super::{Bf16Path, Int8Operand, K_BLOCK_BF16, PackedOperand};
use crate::gemm::Output;

/// The right operand of a product.
#[derive(Clone, Copy)]
pub(crate) enum Factor<'a> {
    /// Where it lies.
    Plain(Operand<'a>),
    /// Packed before.
    Packed(&'a PackedOperand),
    /// Integers, with [`Start::Scaled`].
    Int8(&'a Int8Operand),
}

/// What a product is added to.
#[derive(Clone, Copy)]
pub(crate) enum Start<'a> {
    /// Nothing.
    Zero,
    /// One value for each column.
    Bias(&'a [f32]),
    /// What C holds; f32 only.
    Output,
    /// Nothing: the sums of each column are multiplied with its scale, then its bias is added.
    Scaled(&'a [f32], Option<&'a [f32]>),
}

/// `C[m, n] = start + A[m, k] · B[k, n]`.
pub(crate) struct Product<'a, E> {
    /// Rows of C.
    pub(crate) m: usize,
    /// Columns of C.
    pub(crate) n: usize,
    /// Terms of each dot product.
    pub(crate) k: usize,
    /// Its lines are the rows of A.
    pub(crate) a: Operand<'a>,
    /// Its lines are the columns of B.
    pub(crate) b: Factor<'a>,
    /// Where the sums start.
    pub(crate) start: Start<'a>,
    /// C, its rows `n` apart.
    pub(crate) c: Output<'a, E>,
}

/// Up to this many rows, the rows are shared and the tasks are panels of B.
const FEW_ROWS: usize = 64;
/// Tiles (1 KiB) of A that one task packs at a time: they stay in a quarter of a 2 MiB L2.
const A_TILES: usize = 512;
/// Tiles of B that all rows of a task go over before the next: as many.
const B_TILES_AT_ONCE: usize = 512;
/// Most rows of A in one task.
const TASK_ROWS: usize = 512;
/// Tasks for each thread, if there are rows enough: cores may differ in speed, and who is early takes from who is late.
const TASKS_PER_THREAD: usize = 8;
/// Tiles of B that are packed at a time.
const B_TILES: usize = 4096;
/// Longer sums into f32 go over blocks of terms: of 256 columns B stays in L2 for all rows.
const LONG_BLOCK: usize = K_BLOCK_BF16;
/// Below this many multiply-adds a fork costs more than it saves.
const SERIAL_BELOW: usize = 1 << 18;

thread_local! {
    /// Packed operands, kept for the next product: fresh memory costs a page fault for every 4 KiB.
    static SHARED: Cell<Vec<Tile>> = const { Cell::new(Vec::new()) };
    static OWN: Cell<Vec<Tile>> = const { Cell::new(Vec::new()) };
}

/// Runs `work` on `tiles` tiles of a thread's buffer. The buffer is taken out meanwhile: rayon may start another product
/// on this thread while this one waits.
fn with_buffer<R>(
    key: &'static std::thread::LocalKey<Cell<Vec<Tile>>>,
    tiles: usize,
    work: impl FnOnce(&mut [Tile]) -> R,
) -> R {
    let mut buffer = key.take();
    if buffer.len() < tiles {
        buffer.resize(tiles, Tile::ZERO);
    }
    let result = work(&mut buffer[..tiles]);
    key.set(buffer);
    result
}

/// Packs columns of B, `[k, n]`, over `ks`: the panels one after the other, by all threads.
pub(super) fn pack_panels(from: &Operand, columns: Range<usize>, ks: Range<usize>, tiles: &mut [Tile]) {
    let panel_len = panel_tiles(ks.len());
    let panels = tiles.len().div_ceil(panel_len);
    let tasks = if tiles.len() * 512 * 16 < SERIAL_BELOW { 1 } else { 4 * rayon::current_num_threads() };
    let per_task = panels.div_ceil(tasks);
    let pack = |(index, tiles): (usize, &mut [Tile])| {
        let first = columns.start + index * per_task * LINES;
        let lines = first..columns.end.min(first + per_task * LINES);
        pack_lines(Side::Right, from, lines, ks.clone(), tiles);
    };
    if tasks == 1 {
        pack((0, tiles));
    } else {
        tiles.par_chunks_mut(per_task * panel_len).enumerate().for_each(pack);
    }
}

/// Computes the product; see the module for the order of arithmetic.
///
/// # Panics
/// If a slice is too short (a bug of the caller: public kernels check shapes first).
pub(crate) fn multiply<E: Stored>(p: Product<'_, E>) {
    if p.m == 0 || p.n == 0 {
        return;
    }
    assert!(p.c.len() == p.m * p.n, "bf16 product: length of C");
    match p.start {
        Start::Zero => {}
        Start::Bias(bias) => assert!(bias.len() == p.n, "bf16 product: length of the bias"),
        Start::Output => assert!(E::EXACT, "bf16 product: only f32 accumulates"),
        Start::Scaled(scales, bias) => {
            assert!(
                scales.len() == p.n && bias.is_none_or(|bias| bias.len() == p.n),
                "bf16 product: length of the scales"
            );
        }
    }
    if p.k == 0 {
        return fill(&p);
    }
    p.a.check(p.m, p.k);
    match p.b {
        Factor::Plain(b) => b.check(p.n, p.k),
        Factor::Packed(b) => assert!(b.columns == p.n && b.terms == p.k, "bf16 product: shape of the packed operand"),
        Factor::Int8(b) => assert!(b.dims() == [p.n, p.k], "bf16 product: shape of the integers"),
    }
    let whole = Part { columns: 0..p.n, ks: 0..p.k, start: p.start };
    if p.m <= FEW_ROWS { few_rows(&p, &whole) } else { many_rows(&p, whole) }
}

/// A product of no terms.
fn fill<E: Stored>(p: &Product<'_, E>) {
    for at in 0..p.m * p.n {
        let value = match p.start {
            Start::Zero | Start::Scaled(_, None) => 0.0,
            Start::Bias(bias) | Start::Scaled(_, Some(bias)) => bias[at % p.n],
            Start::Output => return,
        };
        // SAFETY: C holds m × n elements.
        unsafe { p.c.start().add(at).write(E::narrow(value)) };
    }
}

/// Some columns and terms of a product.
pub(super) struct Part<'a> {
    pub(super) columns: Range<usize>,
    pub(super) ks: Range<usize>,
    pub(super) start: Start<'a>,
}

/// Runs tasks `0..count`, in parallel if the work is worth it.
fn run(count: usize, work: usize, task: impl Fn(usize) + Sync + Send) {
    if count == 1 || work < SERIAL_BELOW {
        (0..count).for_each(task)
    } else {
        (0..count).into_par_iter().with_max_len(1).for_each(task)
    }
}

fn few_rows<E: Stored>(p: &Product<'_, E>, part: &Part) {
    let panel_len = panel_tiles(p.k);
    with_buffer(&SHARED, p.m.div_ceil(LINES) * panel_len, |a| {
        for (row, panel) in (0..p.m).step_by(LINES).zip(a.chunks_mut(panel_len)) {
            pack_panel(Side::Left, &p.a, row..p.m.min(row + LINES), 0..p.k, panel);
        }
        let a: &[Tile] = a;
        let panels = p.n.div_ceil(LINES);
        let per_task = panels.div_ceil(4 * rayon::current_num_threads()).max(1);
        run(panels.div_ceil(per_task), p.m.max(8) * p.n * p.k, |task| {
            let mut block = Block::few(p.m);
            for panel in task * per_task..panels.min((task + 1) * per_task) {
                let columns = panel * LINES..p.n.min((panel + 1) * LINES);
                match p.b {
                    Factor::Packed(b) => block.rows(p, part, a, 0..p.m, b.panel(columns.start), columns),
                    Factor::Plain(b) => with_buffer(&OWN, panel_len, |tiles| {
                        pack_panel(Side::Right, &b, columns.clone(), 0..p.k, tiles);
                        block.rows(p, part, a, 0..p.m, tiles, columns);
                    }),
                    Factor::Int8(b) => few_int8(p, part, &mut block, a, b, columns),
                }
            }
        });
    });
}

/// A few rows times one panel of integers.
fn few_int8<E: Stored>(
    p: &Product<'_, E>,
    part: &Part,
    block: &mut Block,
    a: &[Tile],
    b: &Int8Operand,
    columns: Range<usize>,
) {
    #[cfg(target_arch = "x86_64")]
    if let (Start::Scaled(scales, bias), true) = (part.start, p.m <= LINES)
        && block.few_int8(p, a, b.panel(columns.start), (scales, bias), columns.clone())
    {
        return;
    }
    with_buffer(&OWN, a.len() / p.m.div_ceil(LINES), |tiles| {
        b.widen_panel(columns.start, tiles);
        block.rows(p, part, a, 0..p.m, tiles, columns);
    });
}

fn many_rows<E: Stored>(p: &Product<'_, E>, mut part: Part<'_>) {
    if let Factor::Packed(b) = p.b {
        return all_rows(p, &part, &b.tiles);
    }
    // Sums that are to be scaled have to be whole.
    let in_blocks = E::EXACT && matches!(p.b, Factor::Plain(_));
    let terms = if in_blocks { p.k.min(LONG_BLOCK) } else { p.k };
    let width = (B_TILES / panel_tiles(terms)).max(1) * LINES;
    for k in (0..p.k).step_by(terms) {
        part.ks = k..p.k.min(k + terms);
        if k > 0 {
            part.start = Start::Output;
        }
        for column in (0..p.n).step_by(width) {
            part.columns = column..p.n.min(column + width);
            let tiles = part.columns.len().div_ceil(LINES) * panel_tiles(part.ks.len());
            with_buffer(&SHARED, tiles, |tiles| {
                match p.b {
                    Factor::Plain(b) => pack_panels(&b, part.columns.clone(), part.ks.clone(), tiles),
                    Factor::Int8(b) => b.widen_panels(&part.columns, tiles),
                    Factor::Packed(_) => unreachable!("packed before"),
                }
                all_rows(p, &part, tiles);
            });
        }
    }
}

/// All rows times the packed columns of a part, in tasks of rows.
fn all_rows<E: Stored>(p: &Product<'_, E>, part: &Part, b: &[Tile]) {
    let panel_len = panel_tiles(part.ks.len());
    let most = (A_TILES / panel_len).clamp(1, TASK_ROWS / LINES);
    let panels = p.m.div_ceil(LINES);
    // Two panels at least: their lines lie side by side where terms are far apart.
    let per_task = panels.div_ceil(TASKS_PER_THREAD * rayon::current_num_threads()).max(2).min(most) * LINES;
    run(p.m.div_ceil(per_task), p.m * part.columns.len() * part.ks.len(), |task| {
        some_rows(p, part, task * per_task..p.m.min((task + 1) * per_task), b);
    });
}

/// The product with a right operand that was packed before, on this thread alone.
///
/// # Panics
/// As [`multiply`].
pub(crate) fn multiply_here<E: Stored>(p: Product<'_, E>) {
    if p.m == 0 || p.n == 0 {
        return;
    }
    assert!(p.c.len() == p.m * p.n, "bf16 product: length of C");
    let Factor::Packed(b) = p.b else { panic!("bf16 product: right operand that is not packed") };
    assert!(p.k > 0 && b.columns == p.n && b.terms == p.k, "bf16 product: shape of the packed operand");
    p.a.check(p.m, p.k);
    let part = Part { columns: 0..p.n, ks: 0..p.k, start: p.start };
    some_rows(&p, &part, 0..p.m, &b.tiles);
}

/// Some rows times the packed columns of a part.
fn some_rows<E: Stored>(p: &Product<'_, E>, part: &Part, rows: Range<usize>, b: &[Tile]) {
    let panel_len = panel_tiles(part.ks.len());
    let mut block = Block::new();
    // Half a panel can be read where it lies too.
    let direct = match block.path() {
        Bf16Path::Amx if p.a.lies_in_tiles(rows.start, &part.ks) => rows.len() / 16 * 16,
        _ => 0,
    };
    let (direct, rest) = (rows.start..rows.start + direct, rows.start + direct..rows.end);
    with_buffer(&OWN, rest.len().div_ceil(LINES) * panel_len, |packed| {
        if !rest.is_empty() {
            pack_lines(Side::Left, &p.a, rest.clone(), part.ks.clone(), packed);
        }
        let lefts = direct.clone().step_by(LINES).map(|row| {
            let left = Left::InPlace(p.a.line(row, part.ks.start), p.a.stride());
            (left, row..direct.end.min(row + LINES))
        });
        let packed = rest.clone().step_by(LINES).zip(packed.chunks(panel_len));
        let lefts: Vec<_> =
            lefts.chain(packed.map(|(row, a)| (Left::Packed(a), row..rest.end.min(row + LINES)))).collect();
        // A panel of A stays in L1 for all columns of a block, whose panels come from L2.
        let width = (B_TILES_AT_ONCE / panel_len).max(1);
        for (first, b) in part.columns.clone().step_by(width * LINES).zip(b.chunks(width * panel_len)) {
            let places = lefts.iter().flat_map(|(left, rows)| {
                let columns = (first..part.columns.end).step_by(LINES).zip(b.chunks(panel_len));
                columns.map(move |(column, b)| (*left, rows, column, b))
            });
            let mut places = places.peekable();
            while let Some((left, rows, column, b)) = places.next() {
                let next = places.peek().map(|(_, rows, column, _)| (rows.start, *column));
                block.tile(p, part, left, rows.clone(), b, column..part.columns.end.min(column + LINES), next);
            }
        }
    });
}
