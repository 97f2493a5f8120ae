//! Generation: requests go in, completions with the policy's own log-probabilities come out.
//!
//! Continuous batching: every step decodes one token for each active slot, and a slot whose answer has ended is given to
//! the next request at once, so short answers never wait for long ones. Samples of one prompt share its prefill. What
//! a request is answered depends on the request alone: its random numbers are addressed by (key, sample, position), and
//! kernels give a row the same bits in any company.

mod awake;
mod cache;
mod request;
mod scheduler;

pub use cache::{CacheSize, KvCache};
pub use request::{Completion, Finish, OnToken, Request, SamplingKey, SamplingParams};
pub use scheduler::{Scheduler, generate};
