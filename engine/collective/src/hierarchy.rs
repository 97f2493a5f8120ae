//! Calls that cross between machines as little as they must.
//!
//! Ranks of one machine (*node*) form a group, and so do the ranks with the same place on their machines (a *rail*, one for
//! each place). What a node needs from others comes in over its rails in equal parts, once, and is passed on inside.
//! With `L` ranks on each of `N` nodes the bytes that cross between nodes are `1/L` of what the flat calls send there.

use std::sync::Arc;
use std::time::Duration;

use half::bf16;

use crate::bytes::{as_bytes, as_bytes_mut};
use crate::call::{Backend, Traffic};
use crate::collective::Collective;
use crate::error::{Error, Result, check_length};
use crate::status::Status;
use crate::tag::Tag;
use crate::topology::Topology;
use crate::tree::{Reduction, SumBf16};
use crate::work::{Shared, Work};

/// Shorter buffers go the flat way: there it is the number of steps that costs.
const FLAT_BYTES: usize = 4096;

/// A communicator that does large all_gathers, reductions and broadcasts node by node.
///
/// Sums have the **same bits** as those of the flat tree if each node has `2^k` ranks, consecutive and all of one `k`: such
/// nodes are subtrees. Otherwise the order is another, fixed one: the tree inside each node, then over the nodes.
///
/// If the nodes do not have equally many ranks, or there is one node, or each has one rank, every call goes the flat way;
/// so do always f64 reductions, `all_to_all`, `all_gather_varied`, messages, and operations that are only started (their
/// second stage would have to run in the order of waiting, which ranks need not share). A call in stages may take the
/// deadline in each.
#[derive(Debug)]
pub struct Hierarchical {
    inner: Arc<dyn Collective>,
    levels: Option<Levels>,
}

#[derive(Debug)]
struct Levels {
    /// The ranks of this machine.
    node: Arc<dyn Collective>,
    /// The ranks in the same place on all machines; its ranks are node numbers.
    rail: Arc<dyn Collective>,
    /// The rank of each place on each node: `[node * places + place]`.
    ranks: Vec<usize>,
}

impl Hierarchical {
    /// Wraps `inner`; all its ranks call this together.
    ///
    /// # Errors
    /// As [`Collective::split`].
    pub fn new(inner: Arc<dyn Collective>) -> Result<Arc<Self>> {
        let topology = inner.topology();
        let (nodes, world, rank) = (topology.nodes(), inner.world(), inner.rank());
        let places = world / nodes;
        let members: Vec<Vec<usize>> = (0..nodes).map(|node| topology.ranks_on(node)).collect();
        if nodes == 1 || places == 1 || members.iter().any(|node| node.len() != places) {
            return Ok(Arc::new(Self { inner, levels: None }));
        }
        let (my_node, place) = (topology.node_of(rank), topology.local_rank(rank));
        let node = inner.split(Tag::new("hierarchy: node", 0), Some(my_node), place)?;
        let rail = inner.split(Tag::new("hierarchy: rail", 0), Some(place), my_node)?;
        let levels = node.zip(rail).map(|(node, rail)| Levels { node, rail, ranks: members.concat() });
        Ok(Arc::new(Self { inner, levels }))
    }

    /// What this rank has exchanged with other machines in staged calls.
    pub fn rail_traffic(&self) -> Traffic {
        self.levels.as_ref().map(|levels| levels.rail.traffic()).unwrap_or_default()
    }

    /// The two levels, for a call worth it.
    fn staged(&self, bytes: usize) -> Option<&Levels> {
        self.levels.as_ref().filter(|_| bytes > FLAT_BYTES)
    }
}

impl Levels {
    fn nodes(&self) -> usize {
        self.rail.world()
    }

    fn places(&self) -> usize {
        self.node.world()
    }

    /// For each position in the order `[place][node]`, the rank.
    fn by_place(&self) -> impl Iterator<Item = usize> {
        let (nodes, places) = (self.nodes(), self.places());
        (0..places).flat_map(move |place| (0..nodes).map(move |node| self.ranks[node * places + place]))
    }

    /// Over the rails, then inside the node, then into the order of ranks.
    fn all_gather(&self, tag: Tag, mine: &[u8], all: &mut [u8]) -> Result<()> {
        let length = mine.len();
        let mut rail = vec![0; length * self.nodes()];
        self.rail.all_gather(tag, mine, &mut rail)?;
        let mut gathered = vec![0; all.len()];
        self.node.all_gather(tag, &rail, &mut gathered)?;
        if length > 0 {
            for (part, rank) in gathered.chunks_exact(length).zip(self.by_place()) {
                all[rank * length..(rank + 1) * length].copy_from_slice(part);
            }
        }
        Ok(())
    }

    /// Inside the node, each place for all ranks in that place, then over the rails. `part(rank)` is what this rank brings
    /// for `rank`, written to its second argument.
    fn reduce_scatter(&self, tag: Tag, part: impl Fn(usize, &mut [f32]), mine: &mut [f32]) -> Result<()> {
        let length = mine.len();
        let mut brought = vec![0.0; length * self.ranks.len()];
        for (to, rank) in brought.chunks_exact_mut(length).zip(self.by_place()) {
            part(rank, to);
        }
        let mut rail = vec![0.0; length * self.nodes()];
        self.node.reduce_scatter_sum_f32(tag, &brought, &mut rail)?;
        self.rail.reduce_scatter_sum_f32(tag, &rail, mine)
    }

    /// The sum of this place's share of `padded`, whose length is a multiple of the places.
    fn reduce_share(&self, tag: Tag, padded: &[f32]) -> Result<Vec<f32>> {
        let mut share = vec![0.0; padded.len() / self.places()];
        self.node.reduce_scatter_sum_f32(tag, padded, &mut share)?;
        self.rail.all_reduce_sum_f32(tag, &mut share)?;
        Ok(share)
    }

    fn broadcast(&self, tag: Tag, bytes: &mut [u8], root_node: usize, root_place: usize) -> Result<()> {
        if self.node.rank() == root_place {
            self.rail.broadcast(tag, bytes, root_node)?;
        }
        self.node.broadcast(tag, bytes, root_place)
    }
}

impl Collective for Hierarchical {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn world(&self) -> usize {
        self.inner.world()
    }

    fn deadline(&self) -> Duration {
        self.inner.deadline()
    }

    fn backend(&self) -> Backend {
        self.inner.backend()
    }

    fn topology(&self) -> &Topology {
        self.inner.topology()
    }

    /// The flat calls and both levels together.
    fn traffic(&self) -> Traffic {
        let levels = self.levels.iter().flat_map(|levels| [levels.node.traffic(), levels.rail.traffic()]);
        levels.fold(self.inner.traffic(), |sum, level| Traffic {
            sent_bytes: sum.sent_bytes + level.sent_bytes,
            received_bytes: sum.received_bytes + level.received_bytes,
            calls: sum.calls + level.calls,
        })
    }

    fn all_reduce_sum_f32(&self, tag: Tag, values: &mut [f32]) -> Result<()> {
        let Some(levels) = self.staged(size_of_val(values)) else { return self.inner.all_reduce_sum_f32(tag, values) };
        let padding = values.len().next_multiple_of(levels.places());
        let share = if padding == values.len() {
            levels.reduce_share(tag, values)?
        } else {
            let mut padded = values.to_vec();
            padded.resize(padding, 0.0);
            levels.reduce_share(tag, &padded)?
        };
        let mut all = vec![0.0; padding];
        levels.node.all_gather_f32(tag, &share, &mut all)?;
        values.copy_from_slice(&all[..values.len()]);
        Ok(())
    }

    fn all_reduce_sum_f64(&self, tag: Tag, values: &mut [f64]) -> Result<()> {
        self.inner.all_reduce_sum_f64(tag, values)
    }

    fn all_reduce_max_f64(&self, tag: Tag, values: &mut [f64]) -> Result<()> {
        self.inner.all_reduce_max_f64(tag, values)
    }

    /// Staged in f32, so that it is rounded once; what is passed on inside the node is bf16 again.
    fn all_reduce_sum_bf16(&self, tag: Tag, values: &mut [bf16]) -> Result<()> {
        let Some(levels) = self.staged(size_of_val(values)) else { return self.inner.all_reduce_sum_bf16(tag, values) };
        let mut wide: Vec<f32> = values.iter().map(|&value| SumBf16::widen(value)).collect();
        wide.resize(values.len().next_multiple_of(levels.places()), 0.0);
        let share: Vec<bf16> = levels.reduce_share(tag, &wide)?.into_iter().map(SumBf16::narrow).collect();
        let mut all = vec![bf16::ZERO; wide.len()];
        levels.node.all_gather(tag, as_bytes(&share), as_bytes_mut(&mut all))?;
        values.copy_from_slice(&all[..values.len()]);
        Ok(())
    }

    fn reduce_scatter_sum_f32(&self, tag: Tag, values: &[f32], mine: &mut [f32]) -> Result<()> {
        let Some(levels) = self.staged(size_of_val(mine)) else {
            return self.inner.reduce_scatter_sum_f32(tag, values, mine);
        };
        let length = mine.len();
        let needed = length * self.world();
        check_length(self.rank(), tag, "the input of a reduce_scatter", needed, values.len())?;
        let part = |rank: usize, to: &mut [f32]| to.copy_from_slice(&values[rank * length..(rank + 1) * length]);
        levels.reduce_scatter(tag, part, mine)
    }

    fn reduce_scatter_sum_bf16(&self, tag: Tag, values: &[bf16], mine: &mut [bf16]) -> Result<()> {
        let Some(levels) = self.staged(size_of_val(mine)) else {
            return self.inner.reduce_scatter_sum_bf16(tag, values, mine);
        };
        let length = mine.len();
        let needed = length * self.world();
        check_length(self.rank(), tag, "the input of a reduce_scatter", needed, values.len())?;
        let part = |rank: usize, to: &mut [f32]| {
            for (to, &value) in to.iter_mut().zip(&values[rank * length..(rank + 1) * length]) {
                *to = SumBf16::widen(value);
            }
        };
        let mut wide = vec![0.0; length];
        levels.reduce_scatter(tag, part, &mut wide)?;
        for (to, wide) in mine.iter_mut().zip(wide) {
            *to = SumBf16::narrow(wide);
        }
        Ok(())
    }

    fn all_gather(&self, tag: Tag, mine: &[u8], all: &mut [u8]) -> Result<()> {
        let Some(levels) = self.staged(mine.len()) else { return self.inner.all_gather(tag, mine, all) };
        let needed = mine.len() * self.world();
        check_length(self.rank(), tag, "the output of an all_gather", needed, all.len())?;
        levels.all_gather(tag, mine, all)
    }

    fn all_gather_varied(&self, tag: Tag, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.inner.all_gather_varied(tag, mine)
    }

    fn all_to_all(&self, tag: Tag, send: &[u8], receive: &mut [u8]) -> Result<()> {
        self.inner.all_to_all(tag, send, receive)
    }

    fn broadcast(&self, tag: Tag, bytes: &mut [u8], root: usize) -> Result<()> {
        let Some(levels) = self.staged(bytes.len()) else { return self.inner.broadcast(tag, bytes, root) };
        if root >= self.world() {
            return Err(Error::NoSuchRank { tag, root, world: self.world() });
        }
        levels.broadcast(tag, bytes, self.topology().node_of(root), self.topology().local_rank(root))
    }

    fn barrier(&self, tag: Tag) -> Result<()> {
        self.inner.barrier(tag)
    }

    fn agree(&self, tag: Tag, status: Status) -> Result<Status> {
        self.inner.agree(tag, status)
    }

    fn send(&self, tag: Tag, bytes: Vec<u8>, to: usize) -> Result<()> {
        self.inner.send(tag, bytes, to)
    }

    fn receive(&self, tag: Tag, bytes: &mut [u8], from: usize) -> Result<()> {
        self.inner.receive(tag, bytes, from)
    }

    fn start_all_gather_f32(&self, tag: Tag, mine: Shared) -> Result<Work> {
        self.inner.start_all_gather_f32(tag, mine)
    }

    fn start_reduce_scatter_sum_f32(&self, tag: Tag, values: Shared) -> Result<Work> {
        self.inner.start_reduce_scatter_sum_f32(tag, values)
    }

    fn start_all_reduce_sum_f32(&self, tag: Tag, values: Shared) -> Result<Work> {
        self.inner.start_all_reduce_sum_f32(tag, values)
    }

    fn settle(&self, tag: Tag, is_free: &dyn Fn() -> bool) -> Result<()> {
        self.inner.settle(tag, is_free)
    }

    fn split(&self, tag: Tag, color: Option<usize>, key: usize) -> Result<Option<Arc<dyn Collective>>> {
        self.inner.split(tag, color, key)
    }

    fn abort(&self, why: &str) {
        self.inner.abort(why);
    }
}
