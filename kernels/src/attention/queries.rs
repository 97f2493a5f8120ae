//! Tiles of query rows, as forward and backward take them: queries lie in the lanes, so that nothing goes across lanes.

use std::ops::Range;

use super::blocks::{Block, copy_head, padded};
use super::forward::block_range;
use super::{AttentionSpec, BLOCK_KEYS};
use crate::element::Element;
use crate::gemm::transpose;
use crate::math::LANES;
use crate::room::Room;

/// Query rows of a tile: two vectors.
pub(super) const TILE_QUERIES: usize = VECTORS * LANES;
/// Vectors of a tile.
pub(super) const VECTORS: usize = 2;

/// One number for every query of a tile.
pub(super) type Lanes = [[f32; LANES]; VECTORS];

/// Up to 32 consecutive query rows of a sequence, and what they see.
#[derive(Clone, Copy, Debug)]
pub(super) struct QueryTile {
    /// Row of the packed batch of the first query.
    pub(super) token: usize,
    /// Position of the first query in the sequence; a multiple of 32.
    pub(super) position: usize,
    pub(super) rows: usize,
    causal: bool,
    window: Option<usize>,
    /// The keys that any query sees.
    keys: (usize, usize),
}

impl QueryTile {
    /// The tiles of a block's queries, in order.
    pub(super) fn of(block: &Block, spec: &AttentionSpec) -> impl Iterator<Item = Self> + use<> {
        let (block, spec) = (*block, *spec);
        (0..block.rows).step_by(TILE_QUERIES).map(move |row| {
            let (position, rows) = (block.position + row, TILE_QUERIES.min(block.rows - row));
            let keys = (spec.visible(position, block.len).0, spec.visible(position + rows - 1, block.len).1);
            Self { token: block.start() + row, position, rows, causal: spec.causal, window: spec.window, keys }
        })
    }

    /// The keys that any query sees in the block that starts at key `start`, counted from there.
    pub(super) fn keys(&self, start: usize) -> Range<usize> {
        let (from, to) = block_range(self.keys.0, self.keys.1, start);
        from..to.max(from)
    }

    /// The blocks of keys that any query sees.
    pub(super) fn blocks(&self) -> Range<usize> {
        self.keys.0 / BLOCK_KEYS..self.keys.1.div_ceil(BLOCK_KEYS)
    }

    /// The queries that see `key`; of those beyond `rows`, any.
    #[inline(always)]
    pub(super) fn seeing(&self, key: usize) -> Range<usize> {
        let from = if self.causal { key.saturating_sub(self.position) } else { 0 };
        let to = self.window.map_or(TILE_QUERIES, |window| (key + window).saturating_sub(self.position));
        from.min(TILE_QUERIES)..to.min(TILE_QUERIES)
    }
}

/// Rows of one number per query.
#[inline(always)]
pub(super) fn lanes(rows: &mut [f32]) -> &mut [Lanes] {
    rows.as_chunks_mut::<LANES>().0.as_chunks_mut().0
}

/// Columns of a tile's queries, by rows `[32, D padded]` and with queries in the lanes `[D, 32]`.
#[derive(Debug)]
pub(super) struct Gathered {
    pub(super) rows: Room,
    pub(super) lanes: Room,
}

impl Gathered {
    /// Room for heads of `head_dim` columns.
    pub(super) fn new(head_dim: usize) -> Self {
        let rows = Room::zeros(TILE_QUERIES * padded(head_dim));
        Self { rows, lanes: Room::zeros(TILE_QUERIES * head_dim) }
    }

    /// Gathers the head of `head_dim` columns at `column` of the tile's rows of `source`, rows of `width`; queries beyond
    /// the tile's are zero.
    pub(super) fn gather<E: Element>(
        &mut self,
        tile: &QueryTile,
        source: &[E],
        width: usize,
        column: usize,
        head_dim: usize,
    ) {
        let (source, stride) = (&source[tile.token * width..][..tile.rows * width], padded(head_dim));
        self.rows[tile.rows * stride..].fill(0.0);
        copy_head(source, width, column, head_dim, 0, &mut self.rows);
        transpose(&self.rows, stride, TILE_QUERIES, head_dim, TILE_QUERIES, &mut self.lanes);
    }
}
