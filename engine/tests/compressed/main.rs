//! Optimizers whose ranks exchange one bit for each parameter.

#[path = "../parallel/ranks.rs"]
mod ranks;
mod toy;
mod twin;

mod bytes;
mod checkpoint;
mod equal_twin;
mod learning;
mod refusals;
mod signs;
