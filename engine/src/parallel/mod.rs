//! Many ranks, one model: who holds what, and how it comes together.
//!
//! A [`Mesh`] says how ranks share the work; [`Parallel`] is one rank's place in it. Weights and gradients are cut into
//! slices of units by [`Slicing`]; [`weights`](self) bring units together and let them go; [`Gradients`] add up what ranks
//! have computed, always along the same tree, so that the bits of a result do not depend on the number of ranks.

pub(crate) mod bytes;
mod distributed;
mod filed;
mod gradients;
mod group;
mod mesh;
pub(crate) mod pipeline;
mod reduced;
mod reshard;
mod slice;
mod stages;
mod sums;
mod weights;
mod whole;
mod words;

pub(crate) use distributed::{Distributed, ReadUnit};
pub use gradients::{Gradients, Reduction};
pub use group::Group;
pub use mesh::{Mesh, Parallel, ParallelConfig, Placement, ZeroStage};
pub use reshard::{Holding, Transfer, moved_elements, plan};
pub use slice::{Offload, SliceBuffer, Slicing};
pub(crate) use stages::{blocks_of_stage, layouts_of};
pub(crate) use weights::{Fetched, Weights};
pub use whole::LARGE_PASS;
pub(crate) use whole::Packing;
