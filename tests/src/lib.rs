//! Parity, equivalence, fault and end-to-end tests.

pub mod bench;
pub mod golden;
pub mod runs;
