//! Training: the order of passes, the optimizer over slices of units, learning rates and the moving average of weights.

mod adamw;
mod compressed;
mod ema;
mod kind;
mod learning_rate;
mod optimizer;
pub(crate) mod schedule;
mod update;

pub use adamw::MOMENTS_AT_ONCE;
pub(crate) use compressed::LocalBuffer;
pub use ema::Ema;
pub use kind::OptimizerKind;
pub use learning_rate::{Schedule, ScheduleKind};
pub use optimizer::{Optimizer, OptimizerConfig, StepOutcome};
pub(crate) use optimizer::{slice_rank, slicing};
