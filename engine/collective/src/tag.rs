//! What a call is for, so that ranks can tell when they have come apart.

use std::fmt;

/// Names one collective call: what it is for, and which one of its kind it is.
///
/// The sequence number is usually the optimizer step or the micro-batch; it must be equal on all ranks for the same call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tag {
    /// What the call is for, for example `"gradients"`.
    pub site: &'static str,
    /// Which call of that site.
    pub sequence: u64,
}

impl Tag {
    /// The tag of call `sequence` at `site`.
    pub const fn new(site: &'static str, sequence: u64) -> Self {
        Self { site, sequence }
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{}]", self.site, self.sequence)
    }
}
