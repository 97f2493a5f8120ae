//! Products of bf16 matrices, summed in f32.
//!
//! Every output element is `start + Σ_k a·b`: the sum of each block of [`K_BLOCK_BF16`] terms by itself, in an order that
//! the active [`Bf16Path`] fixes, then the blocks added to the start in order, then one rounding if the output is bf16.
//! Neither the number of rows (a single row included) nor the tiling, the threads, or whether an operand was packed
//! before enters the order of arithmetic.
//!
//! Both operands are packed into panels of 32 rows or columns. B is packed whole, by all threads, and shared; then each
//! task packs some rows of A, unless tiles can load them where they lie, and multiplies them with every panel of B. A few
//! rows are packed first and shared, and the tasks are panels of B.

#[cfg(target_arch = "x86_64")]
mod amx;
mod block;
#[cfg(target_arch = "x86_64")]
mod few;
mod int8;
mod pack;
mod path;
mod tasks;
mod tile;

use half::bf16;

pub use path::Bf16Path;

pub(crate) use int8::{Int8Operand, row_maxima};
pub(crate) use pack::Operand;
pub(crate) use tasks::{Factor, Product, Start, multiply, multiply_here};
pub(crate) use tile::{Stored, narrow_row};

use pack::{LINES, Tile, panel_tiles};

/// Terms of a bf16 product that are summed by themselves before the running total is touched.
///
/// Part of the definition of the result: another value gives other bits.
pub const K_BLOCK_BF16: usize = 1024;

/// The right operand `[k, n]` of a product, packed for every path.
pub(crate) struct PackedOperand {
    /// The panels of 32 columns one after the other.
    tiles: Vec<Tile>,
    columns: usize,
    terms: usize,
}

impl PackedOperand {
    /// Nothing yet; see [`PackedOperand::fill`].
    pub(crate) const EMPTY: Self = Self { tiles: Vec::new(), columns: 0, terms: 0 };

    /// Packs the transpose of a weight `[n, k]`.
    pub(crate) fn new(weight: &[bf16], n: usize, k: usize) -> Self {
        let mut packed = Self::EMPTY;
        packed.fill(&Operand::along_k(weight, k), n, k);
        packed
    }

    /// Packs `n` columns of `k` terms in the memory of what was packed before.
    pub(crate) fn fill(&mut self, operand: &Operand<'_>, n: usize, k: usize) {
        self.tiles.resize(n.div_ceil(LINES) * panel_tiles(k), Tile::ZERO);
        (self.columns, self.terms) = (n, k);
        if n > 0 && k > 0 {
            operand.check(n, k);
            tasks::pack_panels(operand, 0..n, 0..k, &mut self.tiles);
        }
    }

    /// The weight `[n, k]` that [`PackedOperand::new`] has packed.
    pub(crate) fn unpacked(&self) -> Vec<bf16> {
        let tiles = panel_tiles(self.terms);
        let mut weight = vec![bf16::ZERO; self.columns * self.terms];
        for (column, line) in weight.chunks_exact_mut(self.terms.max(1)).enumerate() {
            pack::unpack_column(&self.tiles[column / LINES * tiles..][..tiles], column % LINES, line);
        }
        weight
    }

    pub(crate) fn size_bytes(&self) -> usize {
        std::mem::size_of_val(self.tiles.as_slice())
    }

    /// The panel that starts at `column`, a multiple of 32.
    fn panel(&self, column: usize) -> &[Tile] {
        let tiles = panel_tiles(self.terms);
        &self.tiles[column / LINES * tiles..][..tiles]
    }
}
