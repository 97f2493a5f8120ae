//! The order in which samples are visited, and the place in it.
//!
//! Every epoch visits each sample exactly once, in an order that is a function of (seed, epoch, number of samples) alone. So
//! a [`Cursor`] of two numbers is all that a checkpoint needs to go on with the very next sample.

use serde::{Deserialize, Serialize};

use crate::error::{DataError, Result};

/// A permutation of `0..len` that depends on nothing but its arguments: a Fisher–Yates shuffle (Knuth, TAOCP vol. 2, 3.4.2,
/// algorithm P) driven by BLAKE3's output stream over `(seed, epoch, len)`.
pub fn permutation(seed: u64, epoch: u64, len: usize) -> Vec<usize> {
    let mut stream = Stream::new(seed, epoch, len as u64);
    let mut order: Vec<usize> = (0..len).collect();
    for last in (1..len).rev() {
        order.swap(last, stream.below(last as u64 + 1) as usize);
    }
    order
}

/// Random 64-bit words from BLAKE3 in extendable-output mode.
struct Stream {
    reader: blake3::OutputReader,
}

impl Stream {
    fn new(seed: u64, epoch: u64, len: u64) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"tandem order");
        for word in [seed, epoch, len] {
            hasher.update(&word.to_le_bytes());
        }
        Self { reader: hasher.finalize_xof() }
    }

    /// A number below `bound`, without bias: words from the incomplete last interval are thrown away.
    fn below(&mut self, bound: u64) -> u64 {
        let fair = u64::MAX - u64::MAX % bound;
        loop {
            let mut bytes = [0; 8];
            self.reader.fill(&mut bytes);
            let word = u64::from_le_bytes(bytes);
            if word < fair {
                return word % bound;
            }
        }
    }
}

/// How far a run has come: samples already handed out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cursor {
    /// Whole passes over the data.
    pub epoch: u64,
    /// Samples of the current pass.
    pub position: u64,
}

/// Hands out sample numbers in epoch order, for ever.
#[derive(Debug, Clone)]
pub struct Sampler {
    len: usize,
    seed: u64,
    shuffle: bool,
    cursor: Cursor,
    order: Vec<usize>,
}

impl Sampler {
    /// Visits `len` samples in a fresh random order each epoch.
    ///
    /// # Errors
    /// There must be at least one sample.
    pub fn new(len: usize, seed: u64) -> Result<Self> {
        Self::at(len, seed, true, Cursor::default())
    }

    /// As [`Sampler::new`], but always in the data's own order.
    ///
    /// # Errors
    /// There must be at least one sample.
    pub fn in_order(len: usize) -> Result<Self> {
        Self::at(len, 0, false, Cursor::default())
    }

    /// Goes on from a cursor that a sampler of the same data and seed once had.
    ///
    /// # Errors
    /// The cursor stands past the end of the data: the data has shrunk since.
    pub fn resume(self, cursor: Cursor) -> Result<Self> {
        Self::at(self.len, self.seed, self.shuffle, cursor)
    }

    fn at(len: usize, seed: u64, shuffle: bool, cursor: Cursor) -> Result<Self> {
        if len == 0 {
            return Err(DataError::Setting { what: "data".into(), reason: "there is no sample to visit".into() });
        }
        if cursor.position > len as u64 {
            let reason = format!("sample {} of {len}: the data has changed since it was saved", cursor.position);
            return Err(DataError::Setting { what: "data cursor".into(), reason });
        }
        let mut sampler = Self { len, seed, shuffle, cursor, order: Vec::new() };
        sampler.order = sampler.epoch_order();
        Ok(sampler)
    }

    /// Samples per epoch.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never true: a sampler has at least one sample.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The place to resume from.
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// The next `count` sample numbers; an epoch's end is passed without a gap.
    pub fn next_batch(&mut self, count: usize) -> Vec<usize> {
        self.by_ref().take(count).collect()
    }

    fn epoch_order(&self) -> Vec<usize> {
        if self.shuffle { permutation(self.seed, self.cursor.epoch, self.len) } else { (0..self.len).collect() }
    }
}

impl Iterator for Sampler {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        if self.cursor.position as usize >= self.len {
            self.cursor = Cursor { epoch: self.cursor.epoch + 1, position: 0 };
            self.order = self.epoch_order();
        }
        let sample = self.order[self.cursor.position as usize];
        self.cursor.position += 1;
        Some(sample)
    }
}
