//! A few rows on tile registers: integers come from far away, once, and are widened a little ahead of the tiles, so that they
//! are still in the nearest cache when these load them.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::widen::{prefetch_ahead_of, widen_tile};
use super::{Int8Tile, Scaled, store};
use crate::amx::Tiles;
use crate::gemm::bf16::K_BLOCK_BF16;
use crate::gemm::bf16::block::Block;
use crate::gemm::bf16::few;
use crate::gemm::bf16::pack::{LINES, STEP, Tile};
use crate::gemm::bf16::tasks::Product;
use crate::gemm::bf16::tile::{self, Stored, Sums};

/// Tiles that are widened at a time: one step of 32 terms. Two such rooms are a page: were they larger, a load from one would
/// wait for the stores into the other whose addresses end in the same 12 bits.
const WIDENED: usize = 2;

impl Block {
    /// At most 32 rows of A, packed, with all terms, times one panel of integers. Returns whether there are tiles to do it with.
    pub(in crate::gemm::bf16) fn few_int8<E: Stored>(
        &mut self,
        p: &Product<'_, E>,
        a: &[Tile],
        b: &[Int8Tile],
        (scales, bias): (&[f32], Option<&[f32]>),
        columns: Range<usize>,
    ) -> bool {
        /// Tiles of a whole block of terms.
        const TILES: usize = 2 * (K_BLOCK_BF16 / STEP);
        let Some(tiles) = &self.tiles else { return false };
        assert!(p.m <= LINES && a.len() == b.len());
        let last = b.len().div_ceil(TILES) - 1;
        for (index, (a, b)) in a.chunks(TILES).zip(b.chunks(TILES)).enumerate() {
            // SAFETY: there are no tile registers without AVX-512.
            unsafe { multiply(tiles, p.m, a, b, &mut self.sums) };
            if index == last {
                break;
            }
            if index == 0 {
                self.totals.0.copy_from_slice(&self.sums.0);
            } else {
                tile::add(&mut self.totals, &self.sums);
            }
        }
        let (scales, bias) = (&scales[columns.clone()], bias.map(|bias| &bias[columns.clone()]));
        let scaled = Scaled { scales, bias, before: (last > 0).then_some(&self.totals) };
        // SAFETY: all rows of C, whose length `multiply` checked, and columns that no other task writes.
        unsafe { store(self.path, &self.sums, p.m, scaled, p.c.start().add(columns.start), p.n) };
        true
    }
}

/// `sums = A·B` over whole steps of 32 terms, of `rows` rows: the tile instructions of [`few::multiply`].
#[target_feature(enable = "avx512f,avx512bw")]
fn multiply(tiles: &Tiles, rows: usize, a: &[Tile], b: &[Int8Tile], sums: &mut Sums) {
    assert!(a.len() == b.len() && a.len().is_multiple_of(2));
    let mut rooms = [const { MaybeUninit::<[Tile; WIDENED]>::uninit() }; 2];
    let widen = |b: &[Int8Tile], room: &mut MaybeUninit<[Tile; WIDENED]>| {
        for (index, b) in b.iter().enumerate() {
            prefetch_ahead_of(b);
            // SAFETY: the room is that of `WIDENED` tiles, as many as a chunk has at most.
            unsafe { widen_tile(b, room.as_mut_ptr().cast::<Tile>().add(index)) };
        }
    };
    few::start(tiles);
    let mut chunks = b.chunks(WIDENED);
    let mut next = chunks.next();
    let [mut now, mut later] = rooms.each_mut();
    if let Some(b) = next {
        widen(b, now);
    }
    for a in a.chunks(WIDENED) {
        next = chunks.next();
        if let Some(b) = next {
            widen(b, later);
        }
        // SAFETY: A has the two tiles of a step, as its number of tiles is even, and so has the room, which was widened for as
        // many.
        unsafe { few::step(tiles, rows, a.as_ptr(), now.as_ptr().cast()) };
        std::mem::swap(&mut now, &mut later);
    }
    few::finish(tiles, rows, sums);
}
