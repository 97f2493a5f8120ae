//! Parity, equivalence, fault and end-to-end tests.
