//! Naive f64 twins: each kernel written once more as its formula reads, for the tests to compare with.
//!
//! Slices and plain loops; no blocking, no vectors, no threads.

pub mod attention;
pub mod gemm;
pub mod logprob;
pub mod mlp;
pub mod norm;
pub mod optimizer;
pub mod rope;
pub mod sample;

pub use mlp::normal_cdf;
