//! When to give up.

use super::state::State;
use crate::error::{Result, StageError};

/// One odd batch may be left out; so many in a row are no accident.
const MAX_SKIPPED_IN_A_ROW: u32 = 3;

/// Refuses to go on with weights that no longer make numbers.
pub(super) fn check(state: &State) -> Result<()> {
    if state.skipped_in_a_row < MAX_SKIPPED_IN_A_ROW {
        return Ok(());
    }
    Err(StageError::Numerical(format!(
        "step {}: loss or gradient was not finite in {} steps in a row",
        state.step, state.skipped_in_a_row
    )))
}
