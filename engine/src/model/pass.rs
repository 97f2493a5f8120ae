//! One pass over a packed batch: what every block of it is told.

use tandem_kernels::attention::AttentionSpec;
use tandem_kernels::rng::{Philox, Purpose};
use tandem_kernels::rope::RopeTable;

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
}
