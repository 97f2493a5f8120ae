//! The number format that passes compute in, and the one that weights which are not trained are kept in.

use candle_core::DType;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// What weights, activations and key-value caches are stored in while a model computes.
///
/// Products and sums are taken in f32 either way, and master weights, gradients, optimizer state, the residual stream,
/// log-probabilities and losses are f32 either way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32-bit floating point.
    #[default]
    F32,
    /// Its upper half: the same range, 8 bits of significand (Kalamkar et al., 2019). Half the memory, and several times the
    /// speed on processors with instructions for it.
    Bf16,
}

impl Precision {
    /// The element type of tensors in this format.
    pub fn dtype(self) -> DType {
        match self {
            Precision::F32 => DType::F32,
            Precision::Bf16 => DType::BF16,
        }
    }

    /// Bytes of a number in this format.
    pub fn bytes(self) -> usize {
        self.dtype().size_in_bytes()
    }
}

/// What the linear maps of the blocks of a model that is not trained are kept in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightFormat {
    /// What passes compute in.
    #[default]
    Precision,
    /// Integers of 8 bits with a scale for each row, half the memory of bf16. They are widened to bf16 as they are multiplied:
    /// activations, norms, biases, embeddings and heads are as they are in bf16.
    Int8,
}

impl WeightFormat {
    /// Refuses weights that passes in `precision` cannot be computed with.
    ///
    /// # Errors
    /// [`Error::Int8`] for 8 bits in f32.
    pub fn check(self, precision: Precision) -> Result<()> {
        match (self, precision) {
            (WeightFormat::Int8, Precision::F32) => Err(Error::Int8(
                "weights of 8 bits are multiplied in bf16; compute in bf16, or keep them in f32".into(),
            )),
            _ => Ok(()),
        }
    }
}
