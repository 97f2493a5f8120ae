//! The counters of a supervised run: with the weights, all that is needed to go on.

use serde::{Deserialize, Serialize};
use tandem_data::Cursor;

use super::step::Report;

/// What a checkpoint holds beside the engine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct State {
    /// Steps made.
    pub(super) step: u64,
    /// The next row.
    pub(super) cursor: Cursor,
    /// Tokens seen.
    pub(super) tokens: u64,
    /// Steps left out in all.
    pub(super) skipped: u64,
    /// Steps left out without one in between that was made.
    pub(super) skipped_in_a_row: u32,
}

impl State {
    /// Notes a step.
    pub(super) fn count(&mut self, report: &Report, cursor: Cursor) {
        self.step += 1;
        self.cursor = cursor;
        self.tokens += report.tokens as u64;
        if report.applied {
            self.skipped_in_a_row = 0;
        } else {
            self.skipped += 1;
            self.skipped_in_a_row += 1;
        }
    }
}
