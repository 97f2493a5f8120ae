//! Rows in micro-batches.

use tandem_data::packing::{Packing, pack_by_tokens};

use crate::error::Result;

/// The numbers of the rows of each micro-batch, in order: at most `budget` tokens, or one row that has more.
///
/// # Errors
/// A row without tokens.
pub fn batches(lengths: &[usize], budget: usize) -> Result<Vec<Vec<usize>>> {
    let longest = lengths.iter().copied().max().unwrap_or(0);
    Ok(pack_by_tokens(lengths, budget, longest, Packing::InOrder)?)
}
