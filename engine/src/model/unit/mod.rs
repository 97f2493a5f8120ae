//! The unit: the atom that is stored, gathered, recomputed, cut and re-sharded as one.

mod adapters;
mod buffer;
mod content;
mod cut;
mod int8;
mod layout;
mod packed;
mod params;
mod runs;

pub(crate) use adapters::SITES;
pub use adapters::{AdapterSet, AdapterSite};
pub use buffer::UnitBuffer;
pub use content::Content;
pub(crate) use cut::part;
pub use cut::{Cut, Piece};
pub use layout::{BLOCK_ELEMENTS, ParamSlot, Section, UnitLayout};
pub use params::*;
pub use runs::{Run, from_whole, to_whole};

/// Which unit of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum UnitId {
    /// Embedding, final norm and head.
    Ends,
    /// A transformer block, counted from 0.
    Block(usize),
}

impl UnitId {
    /// Its place in the list of units: the ends, then the blocks.
    pub fn index(self) -> usize {
        match self {
            UnitId::Ends => 0,
            UnitId::Block(index) => index + 1,
        }
    }
}

impl std::fmt::Display for UnitId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            UnitId::Ends => f.write_str("ends"),
            UnitId::Block(index) => write!(f, "block.{index}"),
        }
    }
}

/// What a model computes from its last hidden rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// Log-probabilities over the vocabulary.
    Language,
    /// One number (reward models and critics).
    Scalar,
}

/// How a parameter starts when a model is made from nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// All zeros.
    Zeros,
    /// All ones.
    Ones,
    /// Normal with this standard deviation.
    Normal(f64),
    /// Uniform between minus this and this.
    Uniform(f64),
}

/// How tensor parallelism may cut a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shard {
    /// Every rank holds all of it.
    Replicated,
    /// Cut along the outputs, each of several fused projections by itself.
    Rows,
    /// Cut along the inputs.
    Columns,
}
