//! One pass over a packed batch: what every block of it is told.

use candle_core::Tensor;
use tandem_kernels::attention::AttentionSpec;
use tandem_kernels::rng::{Philox, Purpose};
use tandem_kernels::rope::RopeTable;
use tandem_kernels::rows::{spread_rows, take_rows};

use crate::Result;
use crate::batch::Packed;
use crate::parallel::Group;

/// Dropout is an argument of a forward, never a state of the model: whoever does not ask for it has none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Probability of dropping an element of a branch's output or of the embedding. Adapters drop with a probability of their
    /// own ([`crate::model::lora::LoraConfig::dropout`]), even where this one is zero.
    pub probability: f32,
    /// Seed of the masks.
    pub seed: u64,
    /// Step that the masks belong to; forward and backward of a step must agree.
    pub step: u64,
}

/// Dropout resolved for one batch.
pub(super) struct PassDropout {
    pub(super) probability: f32,
    /// Probability of dropping an element of what an adapter reads.
    pub(super) of_adapters: f32,
    pub(super) stream: Philox,
    pub(super) addresses: Vec<(u64, u32)>,
}

/// What every block of one pass is told.
pub(super) struct Pass<'a> {
    /// The attention of each piece held here.
    pub(super) attention: &'a [AttentionSpec],
    /// The ranks that share every block.
    pub(super) tensor: &'a Group,
    pub(super) rope: Option<&'a RopeTable>,
    pub(super) cu_seqlens: &'a [u32],
    pub(super) positions: &'a [u32],
    pub(super) dropout: Option<PassDropout>,
    /// The rows that go on past the attention of the last block, if not all do.
    pub(super) onward: Option<Box<Onward<'a>>>,
}

/// The rows of a batch that the head reads, where they are few enough to leave the others behind: past its attention the last
/// block computes these only, forward and backward. Of a batch of prompts and responses that is half of the rows, of one whose
/// last tokens are scored next to none.
pub(super) struct Onward<'a> {
    /// In ascending order.
    rows: &'a [u32],
    /// Rows of the batch.
    tokens: usize,
    /// What the rest of the block is told.
    pub(super) pass: Pass<'a>,
}

impl<'a> Pass<'a> {
    /// The same pass, whose head reads `rows` of its `tokens` rows.
    pub(super) fn read_at(self, rows: &'a [u32], tokens: usize) -> Self {
        // Taking rows out and putting them back costs about as much as an eighth of them.
        let is_worth_it = rows.len() <= tokens - tokens / 8 && !rows.is_empty() && rows.is_sorted_by(|a, b| a < b);
        if !is_worth_it {
            return self;
        }
        let dropout = self.dropout.as_ref().map(|dropout| dropout.at(rows));
        let pass = Pass { rope: None, cu_seqlens: &[], positions: &[], dropout, onward: None, ..self };
        Self { onward: Some(Box::new(Onward { rows, tokens, pass })), ..self }
    }
}

impl Onward<'_> {
    /// These rows of `x [T, ·]`.
    pub(super) fn take(&self, x: &Tensor) -> Result<Tensor> {
        Ok(take_rows(x, self.rows)?)
    }

    /// The backward of [`Self::take`]: `dx [N, ·]` in these rows, zeros in the others.
    pub(super) fn spread(&self, dx: &Tensor) -> Result<Tensor> {
        Ok(spread_rows(dx, self.rows, self.tokens)?)
    }
}

impl PassDropout {
    /// The masks of `batch`, or `None` if nothing is dropped; `of_adapters` is the probability of adapters.
    pub(super) fn of(dropout: Option<Dropout>, of_adapters: f32, batch: &Packed) -> Option<Self> {
        let dropout = dropout.filter(|dropout| dropout.probability > 0.0 || of_adapters > 0.0)?;
        Some(Self {
            probability: dropout.probability,
            of_adapters,
            stream: Philox::new(dropout.seed, Purpose::Dropout, dropout.step),
            addresses: batch.addresses(),
        })
    }

    /// The masks of some of its rows.
    fn at(&self, rows: &[u32]) -> Self {
        let addresses = rows.iter().map(|&row| self.addresses[row as usize]).collect();
        Self { probability: self.probability, of_adapters: self.of_adapters, stream: self.stream, addresses }
    }
}
