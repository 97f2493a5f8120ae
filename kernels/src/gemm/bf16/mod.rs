//! Products of bf16 matrices, summed in f32.
//!
//! Every output element is `start + Σ_k a·b`: the sum of each block of [`K_BLOCK_BF16`] terms by itself, in an order that
//! the active [`Bf16Path`] fixes, then the blocks added to the start in order, then one rounding if the output is bf16.
//! Neither the number of rows (a single row included) nor the tiling, the threads, or whether an operand was packed
//! before enters the order of arithmetic.
//!
//! Both operands are packed into panels of 32 rows or columns. B is packed whole, by all threads, and shared; then each
//! task packs some rows of A and multiplies them with every panel of B. A few rows are packed first and shared, and
//! the tasks are panels of B.

#[cfg(target_arch = "x86_64")]
mod amx;
mod block;
#[cfg(target_arch = "x86_64")]
mod few;
mod pack;
mod path;
mod tile;

use half::bf16;

pub use path::Bf16Path;

pub(crate) use block::{Factor, Product, Start, multiply};
pub(crate) use pack::Operand;
pub(crate) use tile::Stored;

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
    /// Packs the transpose of a weight `[n, k]`.
    pub(crate) fn new(weight: &[bf16], n: usize, k: usize) -> Self {
        let mut tiles = vec![Tile::ZERO; n.div_ceil(LINES) * panel_tiles(k)];
        if n > 0 && k > 0 {
            let operand = Operand::along_k(weight, k);
            operand.check(n, k);
            block::pack_panels(&operand, 0..n, 0..k, &mut tiles);
        }
        Self { tiles, columns: n, terms: k }
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
