//! Rows of a table, looked up by id: token embedding and learned positions.
//!
//! `y[t] = table[ids[t]]`, and backward `dtable[id] += Σ dy[t]` over the tokens with that id. The sum starts from zero, runs
//! in order of `t` and is added once: so adding two gradients, each into a table of its own, and then the tables gives the
//! bits of adding both into one.
//!
//! A table may be cut into shards of consecutive rows. Of a token's rows in all shards only one is not zero.
//!
//! A table is f32 or bf16. The rows looked up are f32, as they begin the residual stream, and so are all gradients.

use candle_core::Tensor;

use crate::element::with_element;
use crate::error::check_dims;
use crate::profile::{Class, time};
use crate::view::{Output, view, view_mut, view_of};
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
    let _timer = time(Class::Rows, 0);
    const OP: &str = "embedding";
    let width = check(OP, "token id", table, ids)?;
    let mut y = Output::new(ids.len() * width);
    with_element!(OP, table.dtype(), E => {
        cpu::gather(&view_of::<E>(OP, table)?, width, ids, &mut y);
        Ok(())
    })?;
    y.into_tensor((ids.len(), width))
}

/// Backward of [`embedding`] and of [`add_rows`]: adds `dy [T, d]` to the rows `ids` of `dtable [V, d]`, in place.
///
/// Tokens that share an id are summed from zero in order of `t`, and the sum is added to the row once.
///
/// # Errors
/// [`Error::Index`] if an id is V or more; else if a shape, dtype or device does not fit.
pub fn embedding_backward(dy: &Tensor, ids: &[u32], dtable: &Tensor) -> Result<()> {
    let _timer = time(Class::Rows, 0);
    const OP: &str = "embedding_backward";
    let width = check(OP, "token id", dtable, ids)?;
    scatter_add(OP, dy, width, ids, 0, dtable)
}

fn scatter_add(
    op: &'static str,
    dy: &Tensor,
    width: usize,
    ids: &[u32],
    first_entry: usize,
    dtable: &Tensor,
) -> Result<()> {
    check_dims(op, "dy", &[ids.len(), width], dy.dims())?;
    let dy = view(op, dy)?;
    view_mut(op, dtable, |dtable| cpu::scatter_add(&dy, width, ids, first_entry, dtable))
}

/// One shard's part of [`embedding`]: `[T, d]`, with the rows of ids outside the shard zero.
///
/// `table_shard`: `[V_shard, d]`, the rows of the ids from `first_entry` on, of which there may be none. The sum over all
/// shards, in any order, is the row of the table (a −0 becomes 0 if there is more than one shard). Whoever holds the
/// whole table checks the ids: an id in no shard gives a row of zeros.
///
/// # Errors
/// If the shape, dtype or device does not fit.
pub fn embedding_shard(table_shard: &Tensor, first_entry: usize, ids: &[u32]) -> Result<Tensor> {
    let _timer = time(Class::Rows, 0);
    const OP: &str = "embedding_shard";
    let width = shard_width(OP, table_shard)?;
    let mut y = Output::new(ids.len() * width);
    with_element!(OP, table_shard.dtype(), E => {
        cpu::gather_shard(&view_of::<E>(OP, table_shard)?, first_entry, width, ids, &mut y);
        Ok(())
    })?;
    y.into_tensor((ids.len(), width))
}

/// Backward of [`embedding_shard`]: adds the rows of `dy [T, d]` whose ids lie in the shard to `dtable_shard`, in place.
///
/// The bits are those of the same rows of [`embedding_backward`].
///
/// # Errors
/// If a shape, dtype or device does not fit.
pub fn embedding_shard_backward(dy: &Tensor, ids: &[u32], first_entry: usize, dtable_shard: &Tensor) -> Result<()> {
    let _timer = time(Class::Rows, 0);
    const OP: &str = "embedding_shard_backward";
    let width = shard_width(OP, dtable_shard)?;
    scatter_add(OP, dy, width, ids, first_entry, dtable_shard)
}

fn shard_width(op: &'static str, shard: &Tensor) -> Result<usize> {
    match shard.dims() {
        &[_, width] => Ok(width),
        dims => Err(Error::shape(op, "table", "[V, d]", dims)),
    }
}

/// `x[t] += table[positions[t]]` in place, for `x [T, d]` and `table [max_positions, d]`: learned positions.
///
/// # Errors
/// [`Error::Index`] if a position lies beyond the table; else if a shape, dtype or device does not fit.
pub fn add_rows(x: &Tensor, table: &Tensor, positions: &[u32]) -> Result<()> {
    let _timer = time(Class::Rows, 0);
    const OP: &str = "add_rows";
    let width = check(OP, "position", table, positions)?;
    check_dims(OP, "x", &[positions.len(), width], x.dims())?;
    with_element!(OP, table.dtype(), E => {
        let table = view_of::<E>(OP, table)?;
        view_mut(OP, x, |x| cpu::add_rows(x, &table, width, positions))
    })
}
