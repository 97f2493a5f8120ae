//! Computing in bf16 with master weights in f32: copies that follow the masters, checkpoints, learning, the residual stream.

#[path = "../parallel/ranks.rs"]
#[allow(unreachable_pub)]
mod ranks;
#[path = "../parallel/toy.rs"]
#[allow(dead_code, unreachable_pub)]
mod toy;

mod checkpoints;
mod copies;
mod int8;
mod learning;
mod residual;
