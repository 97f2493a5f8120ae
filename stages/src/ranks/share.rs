//! What the leader knows, told to all.

use serde::Serialize;
use serde::de::DeserializeOwned;
use tandem_collective::{Collective, Tag};

use super::LEADER;
use crate::error::{Result, StageError};

/// The leader's value on every rank; the others pass `None`.
///
/// # Errors
/// A peer that failed or did something else.
pub(crate) fn share<T: Serialize + DeserializeOwned>(world: &dyn Collective, tag: Tag, value: Option<T>) -> Result<T> {
    if world.world() == 1 {
        return value.ok_or_else(|| StageError::bug("the leader has nothing to share"));
    }
    let mut bytes = match &value {
        Some(value) if world.rank() == LEADER => serde_json::to_vec(value).map_err(StageError::bug)?,
        _ => Vec::new(),
    };
    let mut length = (bytes.len() as u64).to_le_bytes();
    world.broadcast(tag, &mut length, LEADER)?;
    bytes.resize(usize::try_from(u64::from_le_bytes(length)).map_err(StageError::bug)?, 0);
    world.broadcast(tag, &mut bytes, LEADER)?;
    match value {
        Some(value) => Ok(value),
        None => serde_json::from_slice(&bytes).map_err(StageError::bug),
    }
}
