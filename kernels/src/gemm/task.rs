//! What one task computes: a rectangle of C, over all terms of a part.

use super::K_BLOCK;
use super::block::{At, Gemm, Part, Right, Task};
use super::micro::{Ahead, MicroKernel, Order, PITCH, Tile};
use super::pack::pack_b;
use crate::prefetch::LINE;
use crate::room::Room;

/// Elements of the two lines that are asked for at once.
const PAIR: usize = 2 * LINE / size_of::<f32>();

/// A panel of A stays in L1 while the panels of B pass by: a row of tiles of C is written from left to right.
///
/// Of a B in place, the first row of tiles leaves panels for the others: terms that lie a whole row of B apart share few
/// sets of L1, and no processor follows them by itself.
pub(super) fn run_task(
    g: &Gemm<'_>,
    kernel: &MicroKernel,
    part: &Part<'_>,
    t: &Task,
    next: Option<&Task>,
    a_room: &mut Room,
    b_room: &mut Room,
) {
    let (mr, nr) = (kernel.rows, kernel.columns);
    let panel = a_room.first(mr * PITCH);
    let (first_term, last_term) = (part.k.0, part.k.0 + part.k.1);
    let strips = t.columns.div_ceil(nr);
    for term in (first_term..last_term).step_by(K_BLOCK) {
        let terms = K_BLOCK.min(last_term - term);
        let b = Block::new(g, kernel, part, t, (term, terms), b_room);
        let accumulate = g.accumulate || term > 0;
        for row in (t.row..t.row + t.rows).step_by(mr) {
            let rows = mr.min(t.row + t.rows - row);
            let in_place = &g.a[row * g.a_row_stride + term * g.a_col_stride..];
            let (mut a, mut order) = match g.a_col_stride {
                1 if strips > 1 => {
                    for (row, panel) in panel.chunks_exact_mut(PITCH).take(rows).enumerate() {
                        panel[..terms].copy_from_slice(&in_place[row * g.a_row_stride..][..terms]);
                    }
                    (panel.as_ptr(), Order::Rows(PITCH))
                }
                1 => (in_place.as_ptr(), Order::Rows(g.a_row_stride)),
                stride => (in_place.as_ptr(), Order::Terms(stride)),
            };
            for strip in 0..strips {
                let column = strip * nr;
                // Terms that lie a whole row of A apart are left side by side by the first tile of several.
                let copies = strip == 0 && strips > 1 && matches!(order, Order::Terms(_));
                let ahead =
                    if matches!(part.b, At::InPlace(_)) && (term > first_term || (row > t.row && strip + 1 < strips)) {
                        let is_last = term + terms == last_term;
                        let (of, term) = if is_last { (next, first_term) } else { (Some(t), term + terms) };
                        let tile = ((row - t.row) / mr * strips + strip, t.rows.div_ceil(mr) * strips);
                        of.and_then(|of| block_ahead(g, part, of, (term, last_term), tile))
                    } else if row == t.row && strip + 1 < strips {
                        let (start, stride, _) = b.strip(column + nr, row > t.row);
                        Some(Ahead { start, run: 1, stride, pairs: terms })
                    } else {
                        next_rows(g, t, (row + mr, term), terms, (strip, strips), mr)
                    };
                let (b, b_stride, copy_b) = b.strip(column, row > t.row);
                let tile = Tile {
                    rows,
                    columns: nr.min(t.columns - column),
                    terms,
                    a,
                    order,
                    copy: if copies { panel.as_mut_ptr() } else { std::ptr::null_mut() },
                    copy_b: if t.rows > mr { copy_b } else { std::ptr::null_mut() },
                    b,
                    b_stride,
                    c: g.c.start().wrapping_add(row * g.c_row_stride + t.column + column),
                    c_stride: g.c_row_stride,
                    accumulate,
                    ahead,
                };
                // SAFETY: the rectangle lies inside C (checked in `gemm`), and no other task writes it; A and B hold its
                // terms (likewise), B with whole panels; the copies have room for a panel each.
                unsafe { (kernel.run)(&tile) };
                if copies {
                    (a, order) = (panel.as_ptr(), Order::Terms(rows));
                }
            }
        }
    }
}

/// The part that one strip asks for of the rows of A that come after these, at most two lines for each of its terms.
fn next_rows(
    g: &Gemm<'_>,
    t: &Task,
    (row, term): (usize, usize),
    terms: usize,
    (strip, strips): (usize, usize),
    rows: usize,
) -> Option<Ahead> {
    if row >= t.row + t.rows {
        return None;
    }
    let start = g.a.as_ptr().wrapping_add(row * g.a_row_stride + term * g.a_col_stride);
    if g.a_col_stride == 1 {
        // Rows one after the other, all their terms at once: later blocks find theirs in L2.
        let part = strip * PAIR * K_BLOCK;
        let pairs = (rows * g.a_row_stride).saturating_sub(part).div_ceil(PAIR).min(terms);
        let is_far = term == 0 && pairs > 0;
        return is_far.then_some(Ahead { start: start.wrapping_add(part), run: pairs, stride: 0, pairs });
    }
    (strip + 1 == strips).then_some(Ahead { start, run: 1, stride: g.a_col_stride, pairs: terms })
}

/// The part that one tile of several asks for of a block of terms of A and of B in place, which a task will come to.
fn block_ahead(
    g: &Gemm<'_>,
    part: &Part<'_>,
    t: &Task,
    (term, last_term): (usize, usize),
    (tile, tiles): (usize, usize),
) -> Option<Ahead> {
    let (At::InPlace(b_stride), Right::Strided(b, _)) = (part.b, g.b) else { return None };
    let terms = K_BLOCK.min(last_term - term);
    // From the line on in which they begin.
    let lines = |start: *const f32, columns: usize| {
        let before = start.addr() % LINE / size_of::<f32>();
        (start.wrapping_sub(before), (before + columns).div_ceil(PAIR))
    };
    let a = lines(g.a.as_ptr().wrapping_add(t.row + term * g.a_col_stride), t.rows);
    let b = lines(b.as_ptr().wrapping_add(t.column + term * b_stride), t.columns);
    let a_tiles = (tiles * a.1).div_ceil(a.1 + b.1);
    let ((start, run), stride, tile, tiles) = if tile < a_tiles {
        (a, g.a_col_stride, tile, a_tiles)
    } else {
        (b, b_stride, tile - a_tiles, tiles - a_tiles)
    };
    let (first, end) = (terms * tile / tiles, terms * (tile + 1) / tiles);
    let pairs = (end - first) * run;
    (pairs > 0).then_some(Ahead { start: start.wrapping_add(first * stride), run, stride, pairs })
}

/// Some terms of the columns of a task.
struct Block {
    /// Where a strip of columns is found first, if not in the panels: from the first column on, how many, and how far it
    /// is from a term to the next.
    in_place: Option<(*const f32, usize, usize)>,
    /// Panels, so far from one to the next, of so many columns.
    panels: *mut f32,
    pitch: usize,
    columns: usize,
}

impl Block {
    fn new(
        g: &Gemm<'_>,
        kernel: &MicroKernel,
        part: &Part<'_>,
        t: &Task,
        (term, terms): (usize, usize),
        room: &mut Room,
    ) -> Self {
        let nr = kernel.columns;
        let whole_panels = t.columns.next_multiple_of(nr);
        match (part.b, g.b) {
            (At::Panels(panels), _) => {
                let pitch = nr * part.k.1;
                let first = (t.column - part.columns.0) / nr * pitch + (term - part.k.0) * nr;
                Block { in_place: None, panels: panels[first..].as_ptr().cast_mut(), pitch, columns: nr }
            }
            (At::InPlace(stride), Right::Strided(b, _)) => {
                let whole = t.columns / nr * nr;
                let b = &b[term * stride + t.column..];
                let panels = room.first(whole_panels * terms);
                if whole < t.columns {
                    pack_b(&b[whole..], (stride, 1), t.columns - whole, terms, nr, &mut panels[whole * terms..]);
                }
                let in_place = Some((b.as_ptr(), whole, stride));
                Block { in_place, panels: panels.as_mut_ptr(), pitch: nr * terms, columns: nr }
            }
            (At::Nowhere, Right::Strided(b, strides)) => {
                let panels = room.first(whole_panels * terms);
                pack_b(&b[term * strides.0 + t.column * strides.1..], strides, t.columns, terms, nr, panels);
                Block { in_place: None, panels: panels.as_mut_ptr(), pitch: nr * terms, columns: nr }
            }
            (At::InPlace(_) | At::Nowhere, Right::Packed(..)) => unreachable!("packed before"),
        }
    }

    /// The columns from `column` of the task on, the distance from a term to the next, and where to leave a copy, if that
    /// has not been done `before`.
    fn strip(&self, column: usize, before: bool) -> (*const f32, usize, *mut f32) {
        let panel = self.panels.wrapping_add(column / self.columns * self.pitch);
        match self.in_place {
            Some((b, whole, stride)) if !before && column < whole => (b.wrapping_add(column), stride, panel),
            _ => (panel, self.columns, std::ptr::null_mut()),
        }
    }
}
