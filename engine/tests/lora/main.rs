//! Low-rank adapters: their gradients, their layouts, their merging, and their files.

#[path = "../parallel/ranks.rs"]
#[allow(unreachable_pub)]
mod ranks;
#[path = "../parallel/toy.rs"]
#[allow(dead_code, unreachable_pub)]
mod toy;

mod adapted;
mod checkpoints;
mod gradients;
mod layouts;
mod merging;
mod peft;
mod precision;
