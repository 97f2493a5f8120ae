//! Rows of a table, looked up by id: token embedding and learned positions.
//!
//! `y[t] = table[ids[t]]`, and backward `dtable[id] += Σ dy[t]` over the tokens with that id, in order of `t`.

use candle_core::Tensor;

use crate::error::check_dims;
use crate::view::{tensor, view, view_mut};
use crate::{Error, Result};

mod cpu;

/// Width of `table [V, d]`, after checking every id against V.
fn check(op: &'static str, what: &'static str, table: &Tensor, ids: &[u32]) -> Result<usize> {
    let &[limit, width] = table.dims() else {
        return Err(Error::shape(op, "table", "[V, d]", table.dims()));
    };
    match ids.iter().find(|&&id| id as usize >= limit) {
        Some(&id) => Err(Error::Index { op, what, index: id as usize, limit }),
        None => Ok(width),
    }
}

/// `y[t] = table[ids[t]]` for `table [V, d]`; returns `[T, d]`.
///
/// # Errors
/// [`Error::Index`] if an id is V or more; else if the shape, dtype or device does not fit.
pub fn embedding(table: &Tensor, ids: &[u32]) -> Result<Tensor> {
    const OP: &str = "embedding";
    let width = check(OP, "token id", table, ids)?;
    let mut y = vec![0.0; ids.len() * width];
    cpu::gather(&view(OP, table)?, width, ids, &mut y);
    tensor(y, (ids.len(), width))
}

/// Backward of [`embedding`] and of [`add_rows`]: adds `dy [T, d]` to the rows `ids` of `dtable [V, d]`, in place.
///
/// Tokens that share an id are added in order of `t`.
///
/// # Errors
/// [`Error::Index`] if an id is V or more; else if a shape, dtype or device does not fit.
pub fn embedding_backward(dy: &Tensor, ids: &[u32], dtable: &Tensor) -> Result<()> {
    const OP: &str = "embedding_backward";
    let width = check(OP, "token id", dtable, ids)?;
    check_dims(OP, "dy", &[ids.len(), width], dy.dims())?;
    let dy = view(OP, dy)?;
    view_mut(OP, dtable, |dtable| cpu::scatter_add(&dy, width, ids, dtable))
}

/// `x[t] += table[positions[t]]` in place, for `x [T, d]` and `table [max_positions, d]`: learned positions.
///
/// # Errors
/// [`Error::Index`] if a position lies beyond the table; else if a shape, dtype or device does not fit.
pub fn add_rows(x: &Tensor, table: &Tensor, positions: &[u32]) -> Result<()> {
    const OP: &str = "add_rows";
    let width = check(OP, "position", table, positions)?;
    check_dims(OP, "x", &[positions.len(), width], x.dims())?;
    let table = view(OP, table)?;
    view_mut(OP, x, |x| cpu::add_rows(x, &table, width, positions))
}
