//! The number format that passes compute in.

use candle_core::DType;
use serde::{Deserialize, Serialize};

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
