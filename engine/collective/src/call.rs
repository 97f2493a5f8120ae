//! What kinds of call there are, and who offers them.

use std::fmt;

/// What a call does; ranks that meet must be doing the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[allow(missing_docs)] // One per method of `Collective`, with the same name.
pub enum Operation {
    AllReduceSumF32,
    AllReduceSumF64,
    AllReduceMaxF64,
    AllReduceSumBf16,
    ReduceScatterSumF32,
    ReduceScatterSumBf16,
    AllGather,
    AllGatherVaried,
    AllToAll,
    Broadcast {
        /// The rank whose bytes all get.
        root: usize,
    },
    Barrier,
    Agree,
    StartAllGatherF32,
    StartReduceScatterSumF32,
    StartAllReduceSumF32,
    Split,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::AllReduceSumF32 => "all_reduce_sum_f32",
            Self::AllReduceSumF64 => "all_reduce_sum_f64",
            Self::AllReduceMaxF64 => "all_reduce_max_f64",
            Self::AllReduceSumBf16 => "all_reduce_sum_bf16",
            Self::ReduceScatterSumF32 => "reduce_scatter_sum_f32",
            Self::ReduceScatterSumBf16 => "reduce_scatter_sum_bf16",
            Self::AllGather => "all_gather",
            Self::AllGatherVaried => "all_gather_varied",
            Self::AllToAll => "all_to_all",
            Self::Broadcast { root } => return write!(f, "broadcast from {root}"),
            Self::Barrier => "barrier",
            Self::Agree => "agree",
            Self::StartAllGatherF32 => "start_all_gather_f32",
            Self::StartReduceScatterSumF32 => "start_reduce_scatter_sum_f32",
            Self::StartAllReduceSumF32 => "start_all_reduce_sum_f32",
            Self::Split => "split",
        };
        f.write_str(name)
    }
}

/// What carries the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Backend {
    /// One rank, nothing to carry.
    Solo,
    /// Ranks are threads of one process.
    Threads,
    /// Ranks are processes under an MPI launcher.
    Mpi,
    /// Ranks are GPUs.
    Nccl,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Solo => "solo",
            Self::Threads => "threads",
            Self::Mpi => "mpi",
            Self::Nccl => "nccl",
        })
    }
}

/// What one rank has exchanged with its peers on one communicator so far: payload only, without headers; bytes that stay
/// on the rank do not count.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes that peers got from this rank.
    pub sent_bytes: u64,
    /// Bytes that this rank got from peers.
    pub received_bytes: u64,
    /// Calls made, of any kind.
    pub calls: u64,
}

impl Traffic {
    /// What was exchanged since `before`, an earlier reading of the same communicator.
    pub fn since(self, before: Self) -> Self {
        Self {
            sent_bytes: self.sent_bytes - before.sent_bytes,
            received_bytes: self.received_bytes - before.received_bytes,
            calls: self.calls - before.calls,
        }
    }
}
