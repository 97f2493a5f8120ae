//! Loops of the lookups.

use rayon::prelude::*;

use crate::element::Element;
use crate::view::{Output, rows_per_task};

/// Columns of a table row that are summed at once, in registers.
const SUM_COLUMNS: usize = 64;

pub(super) fn gather<E: Element>(table: &[E], width: usize, ids: &[u32], y: &mut Output<f32>) {
    if width == 0 {
        return;
    }
    let rows = rows_per_task(width);
    y.chunks(rows * width).zip(ids.par_chunks(rows)).for_each(|(y, ids)| {
        for (y, &id) in y.chunks_exact_mut(width).zip(ids) {
            copy(y, &table[id as usize * width..][..width]);
        }
    });
}

pub(super) fn add_rows<E: Element>(x: &mut [f32], table: &[E], width: usize, positions: &[u32]) {
    if width == 0 {
        return;
    }
    let rows = rows_per_task(width);
    x.par_chunks_mut(rows * width).zip(positions.par_chunks(rows)).for_each(|(x, positions)| {
        for (x, &position) in x.chunks_exact_mut(width).zip(positions) {
            add(x, &table[position as usize * width..][..width]);
        }
    });
}

/// [`gather`] from the rows of a shard; rows of other shards' ids are zero.
pub(super) fn gather_shard<E: Element>(
    shard: &[E],
    first_entry: usize,
    width: usize,
    ids: &[u32],
    y: &mut Output<f32>,
) {
    if width == 0 {
        return;
    }
    let entries = shard.len() / width;
    let rows = rows_per_task(width);
    y.chunks(rows * width).zip(ids.par_chunks(rows)).for_each(|(y, ids)| {
        for (y, &id) in y.chunks_exact_mut(width).zip(ids) {
            if let Some(row) = row_in_shard(id, first_entry, entries) {
                copy(y, &shard[row * width..][..width]);
            }
        }
    });
}

/// The row of a shard of `entries` rows that holds `id`.
fn row_in_shard(id: u32, first_entry: usize, entries: usize) -> Option<usize> {
    (id as usize).checked_sub(first_entry).filter(|&row| row < entries)
}

/// Adds to each row of `dtable`, which stands for the ids from `first_entry` on, the sum of the rows of `dy` with its id.
pub(super) fn scatter_add(dy: &[f32], width: usize, ids: &[u32], first_entry: usize, dtable: &mut [f32]) {
    if width == 0 {
        return;
    }
    let entries = dtable.len() / width;
    // Sorted by row and then by token, each table row has one owner and one order.
    let tokens = ids.iter().zip(0u32..);
    let mut order: Vec<(usize, u32)> =
        tokens.filter_map(|(&id, token)| row_in_shard(id, first_entry, entries).map(|row| (row, token))).collect();
    order.par_sort_unstable();
    let mut tasks = Vec::new();
    let (mut rest, mut passed) = (dtable, 0);
    for group in order.chunk_by(|a, b| a.0 == b.0) {
        let start = group[0].0 * width;
        let (row, tail) = rest.split_at_mut(start - passed).1.split_at_mut(width);
        tasks.push((row, group));
        (rest, passed) = (tail, start + width);
    }
    tasks.into_par_iter().with_min_len(rows_per_task(width)).for_each(|(row, group)| add_sum(row, dy, group));
}

/// Adds to `row` the sum of the rows of `dy` that `group` names, itself summed from zero in order.
fn add_sum(row: &mut [f32], dy: &[f32], group: &[(usize, u32)]) {
    let width = row.len();
    for (part, row) in row.chunks_mut(SUM_COLUMNS).enumerate() {
        let mut sums = [0f32; SUM_COLUMNS];
        let sums = &mut sums[..row.len()];
        for &(_, token) in group {
            add(sums, &dy[token as usize * width + part * SUM_COLUMNS..][..row.len()]);
        }
        add(row, sums);
    }
}

fn add<E: Element>(into: &mut [f32], from: &[E]) {
    for (into, from) in into.iter_mut().zip(from) {
        *into += from.wide();
    }
}

fn copy<E: Element>(into: &mut [f32], from: &[E]) {
    for (into, from) in into.iter_mut().zip(from) {
        *into = from.wide();
    }
}
