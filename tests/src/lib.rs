//! Parity, equivalence, fault and end-to-end tests.

pub mod golden;
pub mod runs;
