//! Numerics on candle tensors: every kernel with its backward, on packed batches, knowing nothing of models.
//!
//! Three promises hold for everything here and are tested bit for bit:
//! a token's result does not depend on what else is in the batch; nothing depends on the number of threads; and
//! training and decoding share one order of arithmetic, so they agree on every log-probability.

#[cfg(target_arch = "x86_64")]
mod amx;
pub mod attention;
pub mod dropout;
mod element;
pub mod embedding;
mod error;
pub mod gemm;
pub mod logprob;
mod math;
pub mod mlp;
pub mod norm;
pub mod optimizer;
mod prefetch;
pub mod profile;
pub mod reduce;
pub mod reference;
pub mod rng;
mod room;
pub mod rope;
pub mod rows;
pub mod sample;
mod simd;
pub mod slice;
#[cfg(target_arch = "x86_64")]
mod vector;
mod view;

pub use element::Element;
pub use error::{Error, Result};
pub use simd::Isa;
