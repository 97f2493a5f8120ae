//! What one task computes at a time: 32 rows times 32 columns, over all terms.

use std::ops::Range;

use half::bf16;

use super::pack::{LINES, STEP, Tile};
use super::tasks::{Part, Product, Start};
use super::tile::{self, Base, Stored, Sums};
use super::{Bf16Path, K_BLOCK_BF16, int8};

/// 32 rows of A, or fewer.
#[derive(Clone, Copy)]
pub(super) enum Left<'a> {
    /// A panel.
    Packed(&'a [Tile]),
    /// Where they lie, for the tiles: 16 or 32 rows, so many elements apart.
    InPlace(&'a [bf16], usize),
}

impl<'a> Left<'a> {
    /// Some terms, as many as `tiles` tiles of a panel hold, from tile `from` on.
    fn terms(self, from: usize, tiles: usize) -> Self {
        match self {
            Left::Packed(panel) => Left::Packed(&panel[from..from + tiles]),
            Left::InPlace(rows, stride) => Left::InPlace(&rows[from / 2 * STEP..], stride),
        }
    }
}

/// Where the sums after these will go: a store that misses holds up all that follow, so the lines are asked for one block
/// earlier.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    /// Row 0 of 32.
    pub(super) start: *const u8,
    /// From a row to the next, in bytes.
    pub(super) stride: usize,
    /// Bytes of a row, at most 128.
    pub(super) line: usize,
}

/// What one task needs to compute tiles.
pub(super) struct Block {
    pub(super) path: Bf16Path,
    pub(super) sums: Sums,
    pub(super) totals: Sums,
    /// Whether there are a few rows, and B comes from far away.
    #[cfg(target_arch = "x86_64")]
    is_few: bool,
    #[cfg(target_arch = "x86_64")]
    pub(super) tiles: Option<crate::amx::Tiles>,
}

impl Block {
    /// For many rows.
    pub(super) fn new() -> Self {
        Self::with_left_rows(16, false)
    }

    /// For `rows` rows, which are few.
    pub(super) fn few(rows: usize) -> Self {
        Self::with_left_rows(rows.min(16), true)
    }

    fn with_left_rows(rows: usize, is_few: bool) -> Self {
        let path = Bf16Path::active();
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (rows, is_few);
        Self {
            path,
            sums: Sums::ZERO,
            totals: Sums::ZERO,
            #[cfg(target_arch = "x86_64")]
            is_few,
            #[cfg(target_arch = "x86_64")]
            tiles: (path == Bf16Path::Amx).then(|| crate::amx::Tiles::with_left_rows(rows)).flatten(),
        }
    }

    /// The path that its products take.
    pub(super) fn path(&self) -> Bf16Path {
        self.path
    }

    /// Panels of A with all terms of the part, times one panel of B.
    pub(super) fn rows<E: Stored>(
        &mut self,
        p: &Product<'_, E>,
        part: &Part,
        a: &[Tile],
        rows: Range<usize>,
        b: &[Tile],
        columns: Range<usize>,
    ) {
        for (row, a) in rows.clone().step_by(LINES).zip(a.chunks(b.len())) {
            self.tile(p, part, Left::Packed(a), row..rows.end.min(row + LINES), b, columns.clone(), None);
        }
    }

    /// At most 32 rows of A with all terms of the part, times one panel of B; `next` is the corner (row, column) of what
    /// is computed after it.
    pub(super) fn tile<E: Stored>(
        &mut self,
        p: &Product<'_, E>,
        part: &Part,
        a: Left<'_>,
        rows: Range<usize>,
        b: &[Tile],
        columns: Range<usize>,
        next: Option<(usize, usize)>,
    ) {
        /// Tiles of a whole block of terms.
        const TILES: usize = 2 * (K_BLOCK_BF16 / STEP);
        let size = (rows.len(), columns.len());
        // SAFETY: rows and columns of C, whose length `multiply` checked.
        let c = unsafe { p.c.start().add(rows.start * p.n + columns.start) };
        let mut base = match part.start {
            Start::Zero | Start::Scaled(..) => None,
            Start::Bias(bias) => Some(Base { start: bias[columns.clone()].as_ptr(), stride: 0 }),
            Start::Output => Some(Base { start: c.cast_const().cast(), stride: p.n }),
        };
        let mut ahead = next.map(|(row, column)| Ahead {
            start: p.c.start().wrapping_add(row * p.n + column).cast_const().cast(),
            stride: p.n * size_of::<E>(),
            line: size_of::<E>() * LINES,
        });
        let last = b.len().div_ceil(TILES) - 1;
        for (index, b) in b.chunks(TILES).enumerate() {
            // Asked for once.
            self.multiply(rows.len(), a.terms(index * TILES, b.len()), b, ahead.take());
            if index > 0 && index < last {
                tile::add(&mut self.totals, &self.sums);
                continue;
            }
            if index > 0 {
                base = Some(Base { start: self.totals.0.as_ptr(), stride: LINES });
            }
            if let (Start::Scaled(scales, bias), true) = (part.start, index == last) {
                let before = (index > 0).then_some(&self.totals);
                let (scales, bias) = (&scales[columns.clone()], bias.map(|bias| &bias[columns.clone()]));
                let scaled = int8::Scaled { scales, bias, before };
                // SAFETY: the corner has these rows and columns, which no other task writes.
                unsafe { int8::store(self.path, &self.sums, rows.len(), scaled, c, p.n) };
                continue;
            }
            // SAFETY: the corner has these rows and columns, which no other task writes; so have the bias, and the
            // totals, whose rows are 32 sums.
            unsafe {
                if index == last {
                    tile::store(self.path, &self.sums, size, base, c, p.n);
                } else {
                    tile::store(self.path, &self.sums, size, base, self.totals.0.as_mut_ptr(), LINES);
                }
            }
        }
    }

    /// `sums = A·B`; what lies `_ahead` is asked for meanwhile.
    fn multiply(&mut self, rows: usize, a: Left<'_>, b: &[Tile], _ahead: Option<Ahead>) {
        #[cfg(target_arch = "x86_64")]
        // Without: a place that is there anyway.
        let ahead = _ahead.unwrap_or(Ahead { start: std::ptr::from_ref(&self.sums).cast(), stride: 0, line: 0 });
        let a = match a {
            Left::Packed(a) => {
                assert!(a.len() == b.len());
                #[cfg(target_arch = "x86_64")]
                if let (true, Some(tiles)) = (self.is_few, &self.tiles) {
                    return super::few::multiply(tiles, rows, a, b, &mut self.sums);
                }
                a
            }
            #[cfg(target_arch = "x86_64")]
            Left::InPlace(a, stride) if self.path == Bf16Path::Amx => {
                let (lines, terms) = (rows.next_multiple_of(16), b.len() / 2 * STEP);
                assert!(a.len() >= (lines - 1) * stride + terms);
                let a = super::amx::Lines::in_place(a.as_ptr(), stride);
                // SAFETY: the path is AMX, so `new` has configured the tiles; the rows and terms were just checked.
                return unsafe { super::amx::multiply(rows, a, b, &mut self.sums, ahead) };
            }
            Left::InPlace(..) => unreachable!("only tiles read rows where they lie"),
        };
        match self.path {
            // SAFETY: the path is AMX, so `new` has configured the tiles; a panel has 32 rows.
            #[cfg(target_arch = "x86_64")]
            Bf16Path::Amx => unsafe {
                super::amx::multiply(rows, super::amx::Lines::packed(a), b, &mut self.sums, ahead)
            },
            // SAFETY: the path is active only where AVX-512-bf16 exists.
            #[cfg(target_arch = "x86_64")]
            Bf16Path::Dot => unsafe { tile::dot(rows, a, b, &mut self.sums) },
            _ => tile::widen(rows, a, b, &mut self.sums),
        }
    }
}
