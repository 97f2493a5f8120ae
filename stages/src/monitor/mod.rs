//! What a run tells: rows for machines, bars and tables for people.

mod metrics;
mod profile;
mod progress;
mod table;

pub use metrics::{MetricsLog, MetricsRow, field};
pub use profile::breakdown;
pub use progress::Progress;
pub use table::{Table, printable};
