//! The hybrid engine: one model that trains and generates with the same weights, kernels and log-probabilities.
//!
//! A [`model::Model`] is a list of *units*, each one flat parameter buffer. [`Engine`] holds a model in one of two modes,
//! [`Train`] or [`Generate`]; the type says which. Sequences come as a [`Packed`] batch, without padding. The engine knows
//! tokens, rows and losses; it knows nothing of prompts, rewards or files of text.

pub mod batch;
pub mod checkpoint;
mod error;
pub mod generate;
mod hybrid;
pub mod model;
pub mod parallel;
mod precision;
pub mod train;

pub use batch::{MicroBatch, Packed};
pub use error::{Error, Result};
pub use hybrid::{Engine, Generate, SwitchConfig, SwitchReport, Train};
pub use model::lora::{self, LoraConfig};
pub use model::{Dropout, LogProbs, Model, Recompute};
pub use precision::{Precision, WeightFormat};
