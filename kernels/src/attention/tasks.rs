//! How the attention of whole sequences is cut into tasks, and how what a task reads and writes comes near before it begins.
//!
//! A head is a line or two of every row, and the rows of a batch lie far apart: taken head by head, every line would have
//! to be waited for. So a task takes neighbouring heads of one sequence, and while it computes it asks, row by row, for
//! all lines of the task that comes next, also of those that it will write.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use super::AttentionSpec;
use super::blocks::Block;
use crate::Isa;
#[cfg(target_arch = "x86_64")]
use crate::prefetch::prefetch_line_to_write;
use crate::prefetch::{LINE, prefetch_line};

/// Bytes of a task, read and written: those of two tasks and what they are packed into share an L2 of 2 MiB.
const TASK_BYTES: usize = 640 << 10;

/// Most blocks of queries of a task, where queries are cut.
const TASK_BLOCKS: usize = 8;

/// Some neighbouring key-value heads of one sequence with the query heads that read them.
#[derive(Clone, Debug)]
pub(super) struct Task<'a> {
    pub(super) sequence: &'a [Block],
    /// Blocks of queries, as numbers of blocks of the sequence.
    pub(super) queries: Range<usize>,
    /// Blocks of the keys that these see.
    pub(super) keys: Range<usize>,
    pub(super) kv_heads: Range<usize>,
}

impl Task<'_> {
    /// The query heads.
    pub(super) fn heads(&self, spec: &AttentionSpec) -> Range<usize> {
        self.kv_heads.start * spec.group()..self.kv_heads.end * spec.group()
    }

    /// Pairs of blocks, one of queries and one of keys, that see one another, of all query heads.
    pub(super) fn pairs(&self, spec: &AttentionSpec) -> usize {
        let seen = |block: &Block| key_blocks(block, spec).len();
        self.sequence[self.queries.clone()].iter().map(seen).sum::<usize>() * self.heads(spec).len()
    }

    /// Rows of the packed batch of some of the sequence's blocks.
    fn rows(&self, blocks: &Range<usize>) -> Range<usize> {
        match &self.sequence[blocks.clone()] {
            [first, .., last] => first.start()..last.start() + last.rows,
            [only] => only.start()..only.start() + only.rows,
            [] => 0..0,
        }
    }

    /// The lines of the queries' heads in a matrix `[T, width]` of which a head has `columns`.
    pub(super) fn query_lines<E>(&self, start: *const E, width: usize, columns: usize, spec: &AttentionSpec) -> Lines {
        let heads = self.heads(spec);
        Lines::new(start, width, self.rows(&self.queries), heads.start * columns..heads.end * columns)
    }

    /// The lines of the keys' and the values' heads in a matrix of the shape of the fused projection.
    pub(super) fn key_lines<E>(&self, start: *const E, spec: &AttentionSpec) -> [Lines; 2] {
        [spec.heads, spec.heads + spec.kv_heads].map(|first| {
            let columns = (first + self.kv_heads.start) * spec.head_dim..(first + self.kv_heads.end) * spec.head_dim;
            Lines::new(start, spec.qkv_width(), self.rows(&self.keys), columns)
        })
    }
}

/// The blocks of keys that a block of queries sees.
pub(super) fn key_blocks(block: &Block, spec: &AttentionSpec) -> Range<usize> {
    let from = spec.visible(block.position, block.len).0;
    let to = spec.visible(block.position + block.rows - 1, block.len).1;
    from / super::BLOCK_KEYS..to.div_ceil(super::BLOCK_KEYS)
}

/// Cuts sequences into tasks. A key-value head takes `row_bytes` of a row; `cuts_queries` says whether the queries of a
/// sequence may go to several tasks.
pub(super) fn cut<'a>(
    blocks: &'a [Block],
    spec: &AttentionSpec,
    row_bytes: usize,
    cuts_queries: bool,
) -> Vec<Task<'a>> {
    let sequences: Vec<_> = blocks.chunk_by(|a, b| a.first == b.first).collect();
    // One thread may be much slower than another: the last tasks should not be a large part of the whole.
    let wanted = 4 * rayon::current_num_threads();
    let mut tasks = Vec::new();
    for sequence in &sequences {
        let rows: usize = sequence.iter().map(|block| block.rows).sum();
        let fitting = (rows * row_bytes * spec.kv_heads).div_ceil(TASK_BYTES);
        let parts = fitting.max(wanted.div_ceil(sequences.len())).clamp(1, spec.kv_heads);
        let heads = spec.kv_heads.div_ceil(parts);
        let queries = if !cuts_queries {
            sequence.len()
        } else {
            let cuts = wanted.div_ceil(sequences.len() * parts).max(sequence.len().div_ceil(TASK_BLOCKS));
            sequence.len().div_ceil(cuts).max(TASK_BLOCKS / 2)
        };
        for first_head in (0..spec.kv_heads).step_by(heads) {
            for first in (0..sequence.len()).step_by(queries) {
                let queries = first..sequence.len().min(first + queries);
                let seen = sequence[queries.clone()].iter().map(|block| key_blocks(block, spec));
                let keys = seen.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end)).unwrap_or(0..0);
                let kv_heads = first_head..spec.kv_heads.min(first_head + heads);
                tasks.push(Task { sequence, queries, keys, kv_heads });
            }
        }
    }
    tasks
}

/// Does `work` for every task, with a scratch that is `new` for as many as run at once. What a task needs, `lines`, is
/// asked for during the task before; of its calls of [`Ahead::step`] there should be about `steps`.
pub(super) fn run<S: Send>(
    tasks: &[Task],
    new: impl Fn() -> S + Sync,
    lines: impl Fn(&Task) -> Vec<Lines> + Sync,
    steps: impl Fn(&Task) -> usize + Sync,
    work: impl Fn(&Task, &mut S, &mut Ahead) + Sync,
) {
    // Scratches at rest, each with the task whose lines its thread has asked for.
    let pool: Mutex<Vec<(usize, S)>> = Mutex::new(Vec::new());
    let rest = || pool.lock().unwrap_or_else(PoisonError::into_inner);
    (0..tasks.len()).into_par_iter().with_max_len(1).for_each(|n| {
        let at_rest = {
            let mut rest = rest();
            let best = rest.iter().position(|(ready, _)| *ready == n).or(rest.len().checked_sub(1));
            best.map(|at| rest.swap_remove(at))
        };
        let (ready, mut scratch) = at_rest.unwrap_or_else(|| (usize::MAX, new()));
        if ready != n {
            Ahead::new(lines(&tasks[n]), 1).finish();
        }
        let next = tasks.get(n + 1).map(&lines).unwrap_or_default();
        let mut ahead = Ahead::new(next, steps(&tasks[n]));
        work(&tasks[n], &mut scratch, &mut ahead);
        ahead.finish();
        rest().push((n + 1, scratch));
    });
}

/// Lines of some columns of some rows of a matrix.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lines {
    start: *const u8,
    stride: usize,
    rows: usize,
    /// Of a row.
    count: usize,
    writes: bool,
}

impl Lines {
    fn new<E>(start: *const E, width: usize, rows: Range<usize>, columns: Range<usize>) -> Self {
        let (size, stride) = (size_of::<E>(), width * size_of::<E>());
        let start = start.wrapping_add(rows.start * width + columns.start).cast::<u8>();
        let before = start.addr() % LINE;
        let count = (before + columns.len() * size).div_ceil(LINE) + usize::from(!stride.is_multiple_of(LINE));
        Self { start, stride, rows: rows.len(), count, writes: false }
    }

    /// The same, in order to write them.
    pub(super) fn writing(self) -> Self {
        Self { writes: true, ..self }
    }
}

/// Asks for lines, row by row, a few at a time: all at once would wait for one another.
#[derive(Debug)]
pub(super) struct Ahead {
    parts: Vec<Lines>,
    /// Rows of the longest part.
    rows: usize,
    /// What comes next.
    row: usize,
    part: usize,
    /// Parts of rows, and calls of `step` over which to spread them.
    total: usize,
    steps: usize,
    /// Parts of rows times `steps` that are due.
    due: usize,
}

impl Ahead {
    fn new(mut parts: Vec<Lines>, steps: usize) -> Self {
        if cfg!(not(target_arch = "x86_64")) || Isa::active() < Isa::Avx512 {
            parts.retain(|part| !part.writes);
        }
        let bytes: usize = parts.iter().map(|part| part.rows * part.count * LINE).sum();
        if bytes > 2 * TASK_BYTES {
            // More would push out what came first.
            parts.iter_mut().for_each(|part| part.rows = part.rows * TASK_BYTES / bytes);
        }
        let rows = parts.iter().map(|part| part.rows).max().unwrap_or(0);
        Self { total: rows * parts.len(), parts, rows, row: 0, part: 0, steps: steps.max(1), due: 0 }
    }

    /// Asks for some lines.
    #[inline(always)]
    pub(super) fn step(&mut self) {
        self.due += self.total;
        while self.due >= self.steps {
            self.due -= self.steps;
            self.ask();
        }
    }

    /// Asks for all that are left.
    fn finish(&mut self) {
        while self.row < self.rows {
            self.ask();
        }
    }

    /// Asks for one row of one part.
    #[inline(always)]
    fn ask(&mut self) {
        if self.row >= self.rows {
            return;
        }
        let part = &self.parts[self.part];
        if self.row < part.rows {
            let start = part.start.wrapping_add(self.row * part.stride);
            for line in 0..part.count {
                let at = start.wrapping_add(line * LINE);
                #[cfg(target_arch = "x86_64")]
                if part.writes {
                    prefetch_line_to_write(at);
                    continue;
                }
                prefetch_line(at);
            }
        }
        self.part += 1;
        if self.part == self.parts.len() {
            (self.part, self.row) = (0, self.row + 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::blocks;

    /// Results are not initialised before: every head of every row has to have exactly one task.
    #[test]
    fn tasks_cover_every_head_of_every_row_once() {
        let lengths = [1u32, 63, 64, 65, 700, 0, 2000];
        let mut cu = vec![0u32];
        lengths.iter().for_each(|len| cu.push(cu[cu.len() - 1] + len));
        let tokens = cu[lengths.len()] as usize;
        let blocks = blocks::cut(&cu);
        for (heads, kv_heads, causal, window) in
            [(8, 8, true, None), (9, 3, true, Some(100)), (15, 5, false, None), (7, 1, true, Some(1))]
        {
            let spec = AttentionSpec { heads, kv_heads, head_dim: 32, causal, window, scale: 1.0 };
            for (threads, cuts_queries, row_bytes) in [(1, true, 100), (3, false, 1000), (16, true, 10_000)] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let tasks = pool.install(|| cut(&blocks, &spec, row_bytes, cuts_queries));
                let (mut queries, mut keys) = (vec![0; tokens * heads], vec![0; tokens * kv_heads]);
                for task in &tasks {
                    for block in &task.sequence[task.queries.clone()] {
                        let seen = key_blocks(block, &spec);
                        assert!(task.keys.start <= seen.start && seen.end <= task.keys.end, "{task:?}");
                        for token in block.start()..block.start() + block.rows {
                            task.heads(&spec).for_each(|head| queries[token * heads + head] += 1);
                            task.kv_heads.clone().for_each(|head| keys[token * kv_heads + head] += 1);
                        }
                    }
                }
                assert!(queries.iter().chain(&keys).all(|tasks| *tasks == 1), "{spec:?} {threads}");
            }
        }
    }

    #[test]
    fn every_task_runs_once_whatever_the_threads() {
        let spec = AttentionSpec { heads: 4, kv_heads: 4, head_dim: 1, causal: true, window: None, scale: 1.0 };
        let blocks = blocks::cut(&[0, 10, 200, 300]);
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let done = Mutex::new(Vec::new());
            let values = vec![0f32; 300 * 4];
            pool.install(|| {
                let tasks = cut(&blocks, &spec, 1, false);
                let lines = |task: &Task| vec![task.query_lines(values.as_ptr(), 4, 1, &spec)];
                run(
                    &tasks,
                    || 0,
                    lines,
                    |_| 7,
                    |task, runs, ahead| {
                        *runs += 1;
                        (0..20).for_each(|_| ahead.step());
                        assert_eq!(ahead.row, ahead.rows, "more steps than were announced ask for everything");
                        done.lock().unwrap().extend(task.kv_heads.clone().map(|head| (task.sequence[0].first, head)));
                    },
                );
            });
            let mut done = done.into_inner().unwrap();
            done.sort_unstable();
            let expected: Vec<_> = [0, 1, 4].into_iter().flat_map(|n| (0..4).map(move |head| (n, head))).collect();
            assert_eq!(done, expected);
        }
    }
}
