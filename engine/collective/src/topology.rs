//! Which ranks share a machine.

/// The node (machine) of every rank of one communicator.
///
/// Nodes are numbered `0..nodes()` in the order in which ranks first name them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topology {
    node_of: Vec<usize>,
    local_rank: Vec<usize>,
    nodes: usize,
}

impl Topology {
    /// The topology of ranks on the machines `labels[rank]`; any labels, equal ones mean the same machine.
    pub fn new(labels: &[usize]) -> Self {
        let mut seen: Vec<(usize, usize)> = Vec::new();
        let mut node_of = Vec::with_capacity(labels.len());
        let mut local_rank = Vec::with_capacity(labels.len());
        for &label in labels {
            let node = seen.iter().position(|&(known, _)| known == label).unwrap_or_else(|| {
                seen.push((label, 0));
                seen.len() - 1
            });
            node_of.push(node);
            local_rank.push(seen[node].1);
            seen[node].1 += 1;
        }
        Self { node_of, local_rank, nodes: seen.len() }
    }

    /// `world` ranks on one machine.
    pub fn single_node(world: usize) -> Self {
        Self::new(&vec![0; world])
    }

    /// The number of ranks.
    pub fn world(&self) -> usize {
        self.node_of.len()
    }

    /// The number of machines.
    pub fn nodes(&self) -> usize {
        self.nodes
    }

    /// The machine of `rank`.
    ///
    /// # Panics
    /// If there is no such rank.
    pub fn node_of(&self, rank: usize) -> usize {
        self.node_of[rank]
    }

    /// The number of lower ranks on the machine of `rank`.
    ///
    /// # Panics
    /// If there is no such rank.
    pub fn local_rank(&self, rank: usize) -> usize {
        self.local_rank[rank]
    }

    /// The ranks on `node`, ascending.
    pub fn ranks_on(&self, node: usize) -> Vec<usize> {
        (0..self.world()).filter(|&rank| self.node_of[rank] == node).collect()
    }

    /// The topology of the group whose rank `i` is `members[i]` here.
    ///
    /// # Panics
    /// If a member does not exist.
    pub fn subset(&self, members: &[usize]) -> Self {
        Self::new(&members.iter().map(|&rank| self.node_of[rank]).collect::<Vec<_>>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_numbered_in_order_of_appearance() {
        let topology = Topology::new(&[7, 3, 7, 3, 3]);
        assert_eq!((topology.world(), topology.nodes()), (5, 2));
        assert_eq!((0..5).map(|rank| topology.node_of(rank)).collect::<Vec<_>>(), [0, 1, 0, 1, 1]);
        assert_eq!((0..5).map(|rank| topology.local_rank(rank)).collect::<Vec<_>>(), [0, 0, 1, 1, 2]);
        assert_eq!(topology.ranks_on(1), [1, 3, 4]);
        let group = topology.subset(&[4, 2]);
        assert_eq!((group.nodes(), group.node_of(0), group.node_of(1), group.local_rank(1)), (2, 0, 1, 0));
        assert_eq!(Topology::single_node(3).nodes(), 1);
    }
}
