//! Filling micro-batches up to a token budget, without padding.

use crate::error::{DataError, Result};

/// How samples are put into micro-batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// Keep the samples' order: a micro-batch ends where the next sample does not fit.
    InOrder,
    /// First-fit decreasing (Johnson 1973): the longest first, each into the first micro-batch with room. At most 11/9 of
    /// the optimum plus 6/9 of a micro-batch (Dósa 2007). Inside a micro-batch samples keep their order.
    FirstFitDecreasing,
}

/// Packs samples of the given lengths (tokens) into micro-batches of at most `budget` tokens; returns sample numbers, each
/// exactly once. A sample longer than the budget, yet not longer than `max_len`, gets a micro-batch of its own.
///
/// # Errors
/// A sample without tokens or longer than `max_len`; a budget of zero.
pub fn pack_by_tokens(lengths: &[usize], budget: usize, max_len: usize, packing: Packing) -> Result<Vec<Vec<usize>>> {
    if budget == 0 {
        return Err(wrong("tokens per micro-batch must be above 0".into()));
    }
    for (sample, &length) in lengths.iter().enumerate() {
        if length == 0 {
            return Err(wrong(format!("sample {sample} has no tokens")));
        }
        if length > max_len {
            return Err(wrong(format!("sample {sample} has {length} tokens, more than the {max_len} allowed")));
        }
    }
    Ok(match packing {
        Packing::InOrder => in_order(lengths, budget),
        Packing::FirstFitDecreasing => first_fit_decreasing(lengths, budget),
    })
}

fn wrong(reason: String) -> DataError {
    DataError::Setting { what: "packing".into(), reason }
}

fn in_order(lengths: &[usize], budget: usize) -> Vec<Vec<usize>> {
    let mut batches: Vec<Vec<usize>> = Vec::new();
    let mut room = 0;
    for (sample, &length) in lengths.iter().enumerate() {
        if length > room || batches.is_empty() {
            batches.push(Vec::new());
            room = budget;
        }
        if let Some(batch) = batches.last_mut() {
            batch.push(sample);
        }
        room = room.saturating_sub(length);
    }
    batches
}

fn first_fit_decreasing(lengths: &[usize], budget: usize) -> Vec<Vec<usize>> {
    let mut longest_first: Vec<usize> = (0..lengths.len()).collect();
    longest_first.sort_by_key(|&sample| (std::cmp::Reverse(lengths[sample]), sample));
    let mut batches: Vec<Vec<usize>> = Vec::new();
    let mut rooms = Rooms::new(lengths.len());
    for sample in longest_first {
        let length = lengths[sample];
        match rooms.first_with(length) {
            Some(batch) => {
                batches[batch].push(sample);
                rooms.take(batch, length);
            }
            None => {
                rooms.open(batches.len(), budget.saturating_sub(length));
                batches.push(vec![sample]);
            }
        }
    }
    for batch in &mut batches {
        batch.sort_unstable();
    }
    batches.sort_unstable_by_key(|batch| batch.first().copied());
    batches
}

/// The room left in each micro-batch, as a tournament tree, so that the first with enough is found in logarithmic time.
struct Rooms {
    leaves: usize,
    most: Vec<usize>,
}

impl Rooms {
    fn new(batches: usize) -> Self {
        let leaves = batches.next_power_of_two();
        Self { leaves, most: vec![0; 2 * leaves] }
    }

    fn open(&mut self, batch: usize, room: usize) {
        let mut node = self.leaves + batch;
        self.most[node] = room;
        while node > 1 {
            node /= 2;
            self.most[node] = self.most[2 * node].max(self.most[2 * node + 1]);
        }
    }

    fn take(&mut self, batch: usize, length: usize) {
        let room = self.most[self.leaves + batch];
        self.open(batch, room - length);
    }

    /// The first batch with room for `length`, which is above zero, as every open batch's room may be zero.
    fn first_with(&self, length: usize) -> Option<usize> {
        if self.most[1] < length {
            return None;
        }
        let mut node = 1;
        while node < self.leaves {
            node *= 2;
            if self.most[node] < length {
                node += 1;
            }
        }
        Some(node - self.leaves)
    }
}
