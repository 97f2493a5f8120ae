//! How a model is cut for tensor parallelism.
//!
//! A model is cut into a fixed number of *pieces*: ranges of heads, of MLP columns and of vocabulary entries. A rank computes
//! one or more neighbouring pieces, and what they contribute to a row is added in a fixed binary tree over the pieces. So the
//! number of pieces decides the bits of a result, and the number of ranks that share them does not.

use std::ops::Range;

use crate::model::spec::ModelSpec;
use crate::{Error, Result};

/// The vocabulary is cut between blocks of this many entries, which the head's kernels sum as one.
const VOCABULARY_BLOCK: usize = 512;

/// Into how many pieces a model is cut, and which of them are held here.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Cut {
    /// Pieces of the model.
    pub pieces: usize,
    /// Those held here.
    pub held: Range<usize>,
}

/// One piece of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Its key-value heads.
    pub kv_heads: Range<usize>,
    /// Its query heads.
    pub heads: Range<usize>,
    /// Its columns of the MLP.
    pub mlp: Range<usize>,
    /// Its entries of the vocabulary; may be empty where the vocabulary is small.
    pub vocabulary: Range<usize>,
}

impl Cut {
    /// One piece, held here.
    pub fn none() -> Self {
        Self { pieces: 1, held: 0..1 }
    }

    /// All of `pieces`, held here.
    pub fn whole(pieces: usize) -> Self {
        Self { pieces, held: 0..pieces }
    }

    /// What rank `index` of `ranks` holds of `pieces`.
    ///
    /// # Errors
    /// If the pieces cannot be dealt out evenly.
    pub fn share(pieces: usize, ranks: usize, index: usize) -> Result<Self> {
        if ranks == 0 || !pieces.is_multiple_of(ranks) {
            return Err(Error::Mesh(format!(
                "{pieces} tensor pieces cannot be dealt out to {ranks} tensor-parallel ranks; make parallel.tensor_lanes a \
                 multiple of both parallel.tensor and ppo.inference_tp_size"
            )));
        }
        let each = pieces / ranks;
        Ok(Self { pieces, held: index * each..(index + 1) * each })
    }

    /// Whether everything is held here.
    pub fn is_whole(&self) -> bool {
        self.held == (0..self.pieces)
    }

    /// Refuses a number of pieces that a model cannot be cut into.
    ///
    /// # Errors
    /// [`Error::Mesh`] with the heads and what to do.
    pub fn check(&self, spec: &ModelSpec) -> Result<()> {
        if self.pieces <= spec.kv_heads && self.pieces <= spec.mlp_width {
            return Ok(());
        }
        Err(Error::Mesh(format!(
            "a model of {} key-value heads cannot be cut into {} pieces; lower parallel.tensor, ppo.inference_tp_size and \
             parallel.tensor_lanes to at most {}",
            spec.kv_heads, self.pieces, spec.kv_heads
        )))
    }

    /// The piece `index` of a model of `spec`.
    pub fn piece(&self, spec: &ModelSpec, index: usize) -> Piece {
        let kv_heads = part(spec.kv_heads, self.pieces, index);
        let group = spec.heads / spec.kv_heads;
        let blocks = part(spec.vocab_size.div_ceil(VOCABULARY_BLOCK), self.pieces, index);
        let entry = |block: usize| (block * VOCABULARY_BLOCK).min(spec.vocab_size);
        Piece {
            heads: kv_heads.start * group..kv_heads.end * group,
            kv_heads,
            mlp: part(spec.mlp_width, self.pieces, index),
            vocabulary: entry(blocks.start)..entry(blocks.end),
        }
    }
}

/// Part `index` of `0..all` in `parts` nearly equal parts, the larger ones first.
pub(crate) fn part(all: usize, parts: usize, index: usize) -> Range<usize> {
    let (each, more) = (all / parts, all % parts);
    let start = |index: usize| index * each + index.min(more);
    start(index)..start(index + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_everything_once() {
        for (all, parts) in [(9, 2), (3, 2), (8, 4), (5, 5), (0, 3)] {
            let mut next = 0;
            for index in 0..parts {
                let range = part(all, parts, index);
                assert_eq!(range.start, next);
                next = range.end;
            }
            assert_eq!(next, all);
        }
        assert_eq!((part(3, 2, 0), part(3, 2, 1)), (0..2, 2..3));
    }

    #[test]
    fn pieces_are_dealt_out_evenly() {
        assert_eq!(Cut::share(4, 2, 1).unwrap(), Cut { pieces: 4, held: 2..4 });
        let error = Cut::share(3, 2, 0).unwrap_err().to_string();
        assert!(error.contains("3 tensor pieces") && error.contains("tensor_lanes"), "{error}");
    }
}
