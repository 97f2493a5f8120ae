//! Training: the optimizer over flat unit buffers, learning-rate schedules and the moving average of weights.

mod ema;
mod optimizer;
mod schedule;

pub use ema::Ema;
pub use optimizer::{Optimizer, OptimizerConfig, StepOutcome};
pub use schedule::{Schedule, ScheduleKind};
