//! The packed batch: the tokens of all sequences end to end, without a single pad token.

use crate::model::Dropout;
use crate::{Error, Result};

/// What goes through a model at once in training.
#[derive(Clone, Debug)]
pub struct MicroBatch {
    /// The sequences.
    pub batch: Packed,
    /// Rows of the batch that the loss is about, `[N]`.
    pub rows: Vec<u32>,
    /// The token that each of them is to predict, `[N]`; empty for losses on scores.
    pub labels: Vec<u32>,
    /// Dropout, if any.
    pub dropout: Option<Dropout>,
}

/// `B` sequences of together `T` tokens, end to end.
///
/// No pad token exists, so nothing is ever masked by comparing token values: what a loss covers is said by spans.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Packed {
    /// Token ids, `[T]`.
    pub ids: Vec<u32>,
    /// Where sequences start and end, `[B + 1]`, from 0 to `T`.
    pub cu_seqlens: Vec<u32>,
    /// Position of each token in its sequence, `[T]`.
    pub positions: Vec<u32>,
    /// What each sequence is called in the address of its random numbers, `[B]`.
    pub samples: Vec<u64>,
}

impl Packed {
    /// An empty batch.
    pub fn new() -> Self {
        Self { cu_seqlens: vec![0], ..Self::default() }
    }

    /// Packs sequences; each is named by its index in the address of its random numbers.
    pub fn from_sequences<S: AsRef<[u32]>>(sequences: impl IntoIterator<Item = S>) -> Self {
        let mut batch = Self::new();
        for (index, ids) in sequences.into_iter().enumerate() {
            batch.push(ids.as_ref(), index as u64);
        }
        batch
    }

    /// Appends a sequence known as `sample`.
    pub fn push(&mut self, ids: &[u32], sample: u64) {
        self.ids.extend_from_slice(ids);
        self.positions.extend(0..ids.len() as u32);
        self.cu_seqlens.push(self.ids.len() as u32);
        self.samples.push(sample);
    }

    /// Number of tokens, `T`.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// Number of sequences, `B`.
    pub fn sequences(&self) -> usize {
        self.samples.len()
    }

    /// Rows of the batch that sequence `index` occupies.
    ///
    /// # Panics
    /// If there is no such sequence.
    pub fn rows(&self, index: usize) -> std::ops::Range<usize> {
        self.cu_seqlens[index] as usize..self.cu_seqlens[index + 1] as usize
    }

    /// Address of each token for randomness: (sample, position), `[T]`.
    pub(crate) fn addresses(&self) -> Vec<(u64, u32)> {
        let lengths = self.cu_seqlens.windows(2).map(|w| (w[1] - w[0]) as usize);
        let samples = self.samples.iter().zip(lengths).flat_map(|(&sample, n)| std::iter::repeat_n(sample, n));
        samples.zip(self.positions.iter().copied()).collect()
    }

    /// Checks that no sequence is empty or longer than `limit` tokens.
    ///
    /// # Errors
    /// Names the first sequence that does not fit.
    pub(crate) fn check(&self, limit: usize) -> Result<()> {
        for (sequence, w) in self.cu_seqlens.windows(2).enumerate() {
            let tokens = (w[1] - w[0]) as usize;
            if tokens == 0 || tokens > limit {
                return Err(Error::SequenceLength { sequence, tokens, limit });
            }
        }
        Ok(())
    }
}
