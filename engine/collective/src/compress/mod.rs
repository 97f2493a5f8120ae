//! Sums of one bit per number.
//!
//! For data-parallel training over slow networks: what crosses is the sign of each number and one scale for many, and what
//! the signs leave out is carried over to the next call (*error feedback*), so that over time nothing is lost. The transport
//! of 1-bit Adam, 0/1 Adam, 1-bit LAMB and sign descent; which numbers to send when is the optimizer's business.

mod all_reduce;
mod majority;
mod signs;
#[cfg(test)]
mod tests;

pub use all_reduce::{Compression, compressed_all_reduce};
pub use majority::sign_majority;
pub use signs::{pack_signs, unpack_signs};
