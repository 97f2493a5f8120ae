//! What one task computes: a rectangle of C, over all terms of a part.

use super::K_BLOCK;
use super::block::{At, Gemm, Part, Right, Task};
use super::micro::{Ahead, MicroKernel, Order, Tile};
use super::pack::pack_b;
use crate::prefetch::LINE;
use crate::room::Room;

/// A panel of A stays in L1 while the panels of B pass by: a row of tiles of C is written from left to right.
pub(super) fn run_task(
    g: &Gemm<'_>,
    kernel: &MicroKernel,
    part: &Part<'_>,
    t: &Task,
    a_room: &mut Room,
    b_room: &mut Room,
) {
    let (mr, nr) = (kernel.rows, kernel.columns);
    let panel = a_room.first(mr * K_BLOCK).as_mut_ptr();
    let (first_term, last_term) = (part.k.0, part.k.0 + part.k.1);
    let strips = t.columns.div_ceil(nr);
    for term in (first_term..last_term).step_by(K_BLOCK) {
        let terms = K_BLOCK.min(last_term - term);
        let b = Block::new(g, kernel, part, t, (term, terms), b_room);
        let accumulate = g.accumulate || term > 0;
        for row in (t.row..t.row + t.rows).step_by(mr) {
            let rows = mr.min(t.row + t.rows - row);
            let mut a = g.a[row * g.a_row_stride + term * g.a_col_stride..].as_ptr();
            let mut order =
                if g.a_col_stride == 1 { Order::Rows(g.a_row_stride) } else { Order::Terms(g.a_col_stride) };
            for strip in 0..strips {
                let column = strip * nr;
                // The first tile of several leaves the rows in the order in which the others read them from L1.
                let copies = strip == 0 && strips > 1;
                let ahead = if row == t.row && strip + 1 < strips {
                    b.strip(column + nr).map(|(start, stride)| Ahead { start, stride })
                } else {
                    next_rows(g, t, (row + mr, term), last_term, (strip, strips), mr)
                };
                let (b, b_stride) = b.strip(column).expect("a strip of the task");
                let tile = Tile {
                    rows,
                    columns: nr.min(t.columns - column),
                    terms,
                    a,
                    order,
                    copy: if copies { panel } else { std::ptr::null_mut() },
                    b,
                    b_stride,
                    c: g.c.start().wrapping_add(row * g.c_row_stride + t.column + column),
                    c_stride: g.c_row_stride,
                    accumulate,
                    ahead,
                };
                // SAFETY: the rectangle lies inside C (checked in `gemm`), and no other task writes it; A and B hold its
                // terms (likewise), B with whole panels; the copy has room for a panel.
                unsafe { (kernel.run)(&tile) };
                if copies {
                    (a, order) = (panel, Order::Terms(rows));
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
    last_term: usize,
    (strip, strips): (usize, usize),
    rows: usize,
) -> Option<Ahead> {
    /// Elements of two lines.
    const PACE: usize = 2 * LINE / size_of::<f32>();
    let start = g.a.as_ptr().wrapping_add(row * g.a_row_stride + term * g.a_col_stride);
    if g.a_col_stride == 1 {
        // Rows one after the other, all their terms at once: later blocks find theirs in L2.
        let part = strip * PACE * K_BLOCK;
        let is_far = term == 0 && row < t.row + t.rows && part < rows * g.a_row_stride;
        return is_far.then_some(Ahead { start: start.wrapping_add(part), stride: PACE });
    }
    let start = if row < t.row + t.rows {
        start
    } else if term + K_BLOCK < last_term {
        g.a.as_ptr().wrapping_add(t.row + (term + K_BLOCK) * g.a_col_stride)
    } else {
        return None;
    };
    (strip + 1 == strips).then_some(Ahead { start, stride: g.a_col_stride })
}

/// Some terms of the columns of a task.
enum Block<'a> {
    /// Panels, so far from one to the next, of so many columns.
    Panels(&'a [f32], usize, usize),
    /// In place: from the first column on, so many, so far from a term to the next; what is left of a panel's columns.
    InPlace(&'a [f32], usize, usize, &'a [f32], usize),
}

impl<'a> Block<'a> {
    fn new(
        g: &Gemm<'a>,
        kernel: &MicroKernel,
        part: &Part<'a>,
        t: &Task,
        (term, terms): (usize, usize),
        room: &'a mut Room,
    ) -> Self {
        let nr = kernel.columns;
        match (part.b, g.b) {
            (At::Panels(panels), _) => {
                let pitch = nr * part.k.1;
                let first = (t.column - part.columns.0) / nr * pitch + (term - part.k.0) * nr;
                Block::Panels(&panels[first..], pitch, nr)
            }
            (At::InPlace(stride), Right::Strided(b, _)) => {
                let whole = t.columns / nr * nr;
                let b = &b[term * stride + t.column..];
                let rest = room.first(nr * terms);
                if whole < t.columns {
                    pack_b(&b[whole..], (stride, 1), t.columns - whole, terms, nr, rest);
                }
                Block::InPlace(b, stride, whole, rest, nr)
            }
            (At::Nowhere, Right::Strided(b, strides)) => {
                let panels = room.first(t.columns.next_multiple_of(nr) * terms);
                pack_b(&b[term * strides.0 + t.column * strides.1..], strides, t.columns, terms, nr, panels);
                Block::Panels(panels, nr * terms, nr)
            }
            (At::InPlace(_) | At::Nowhere, Right::Packed(..)) => unreachable!("packed before"),
        }
    }

    /// The columns from `column` of the task on, and the distance from a term to the next; none behind the last.
    fn strip(&self, column: usize) -> Option<(*const f32, usize)> {
        match *self {
            Block::Panels(panels, pitch, nr) => Some((panels.get(column / nr * pitch..)?.as_ptr(), nr)),
            Block::InPlace(b, stride, whole, ..) if column < whole => Some((b[column..].as_ptr(), stride)),
            Block::InPlace(_, _, _, rest, nr) => Some((rest.as_ptr(), nr)),
        }
    }
}
