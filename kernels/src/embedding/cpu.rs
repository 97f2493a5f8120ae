//! Loops of the lookups.

use rayon::prelude::*;

use crate::view::rows_per_task;

pub(super) fn gather(table: &[f32], width: usize, ids: &[u32], y: &mut [f32]) {
    if width == 0 {
        return;
    }
    let rows = rows_per_task(width);
    y.par_chunks_mut(rows * width).zip(ids.par_chunks(rows)).for_each(|(y, ids)| {
        for (y, &id) in y.chunks_exact_mut(width).zip(ids) {
            y.copy_from_slice(&table[id as usize * width..][..width]);
        }
    });
}

pub(super) fn add_rows(x: &mut [f32], table: &[f32], width: usize, positions: &[u32]) {
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

pub(super) fn scatter_add(dy: &[f32], width: usize, ids: &[u32], dtable: &mut [f32]) {
    if width == 0 {
        return;
    }
    // Sorted by id and then by token, each table row has one owner and one order.
    let mut order: Vec<(u32, u32)> = ids.iter().copied().zip(0..).collect();
    order.par_sort_unstable();
    let mut tasks = Vec::new();
    let (mut rest, mut passed) = (dtable, 0);
    for group in order.chunk_by(|a, b| a.0 == b.0) {
        let start = group[0].0 as usize * width;
        let (row, tail) = rest.split_at_mut(start - passed).1.split_at_mut(width);
        tasks.push((row, group));
        (rest, passed) = (tail, start + width);
    }
    tasks.into_par_iter().with_min_len(rows_per_task(width)).for_each(|(row, group)| {
        for &(_, token) in group {
            add(row, &dy[token as usize * width..][..width]);
        }
    });
}

fn add(into: &mut [f32], from: &[f32]) {
    for (into, from) in into.iter_mut().zip(from) {
        *into += from;
    }
}
