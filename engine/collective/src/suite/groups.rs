//! Operations under way, groups, and the count of what was exchanged.

use std::sync::Arc;

use super::{LENGTHS, Suite, sum_of, values};
use crate::collective::Collective;
use crate::error::{Error, Result};
use crate::work::{Shared, Work};

impl Suite<'_> {
    pub(super) fn started_operations(&self) {
        for (salt, length) in LENGTHS.into_iter().enumerate() {
            self.eight_in_flight(salt, length);
        }
        // An operation that nobody waits for is no reason to stop.
        let dropped = self.world.start_all_reduce_sum_f32(self.tag(), Arc::new(vec![1.0_f32; 10])).unwrap();
        drop(dropped);
        let tag = self.tag();
        let work = self.world.start_all_gather_f32(tag, Arc::new(vec![self.rank as f32])).unwrap();
        let error = work.wait_into(&mut vec![0.0; self.ranks + 1]).unwrap_err();
        self.check(matches!(error, Error::WrongLength { expected, .. } if expected == self.ranks), error);
        if self.ranks > 1 {
            let odd: Shared = Arc::new(vec![0.0_f32; self.ranks + 1]);
            let error = self.world.start_reduce_scatter_sum_f32(self.tag(), odd).unwrap_err();
            self.check(matches!(error, Error::WrongLength { .. }), error);
        }
        let mut work = self.world.start_all_reduce_sum_f32(self.tag(), Arc::new(vec![2.0_f32; 3])).unwrap();
        self.world.barrier(self.tag()).unwrap();
        while !work.is_ready().unwrap() {
            std::thread::yield_now();
        }
        let mut out = [0.0; 3];
        work.wait_into(&mut out).unwrap();
        self.check(out == [2.0 * self.ranks as f32; 3], "an operation started before a barrier");
    }

    /// What was lent comes back once all ranks have waited: large enough that no backend has put it into an envelope.
    pub(super) fn lent_values(&self) {
        let n = 100_000 * self.ranks;
        for kind in 0..3 {
            let lent = Arc::new(vec![1.0_f32; n]);
            let (shared, tag): (Shared, _) = (Arc::<Vec<f32>>::clone(&lent), self.tag());
            let (work, results) = match kind {
                0 => (self.world.start_all_gather_f32(tag, shared), n * self.ranks),
                1 => (self.world.start_reduce_scatter_sum_f32(tag, shared), n / self.ranks),
                _ => (self.world.start_all_reduce_sum_f32(tag, shared), n),
            };
            work.unwrap().wait_into(&mut vec![0.0; results]).unwrap();
            self.world.barrier(self.tag()).unwrap();
            self.world.settle(self.tag(), &|| Arc::strong_count(&lent) == 1).unwrap();
            self.check(Arc::strong_count(&lent) == 1, "what was lent comes back");
        }
    }

    /// Eight operations of three kinds, with blocking calls in between, waited for from the last to the first.
    fn eight_in_flight(&self, salt: usize, length: usize) {
        let kinds = [0, 1, 2, 0, 2, 1, 1, 0];
        let mut flights = Vec::new();
        for (number, kind) in kinds.into_iter().enumerate() {
            let salt = salt * kinds.len() + number;
            let brought = if kind == 1 { length * self.ranks } else { length };
            let shared: Shared = Arc::new(values::<f32>(salt, self.rank, brought));
            let start: Result<Work> = match kind {
                0 => self.world.start_all_gather_f32(self.tag(), shared),
                1 => self.world.start_reduce_scatter_sum_f32(self.tag(), shared),
                _ => self.world.start_all_reduce_sum_f32(self.tag(), shared),
            };
            flights.push((salt, kind, start.unwrap()));
            if number % 3 == 0 {
                let mut one = [1.0];
                self.world.all_reduce_sum_f64(self.tag(), &mut one).unwrap();
                self.check(one == [self.ranks as f64], "a blocking call between operations under way");
            }
        }
        for (salt, kind, work) in flights.into_iter().rev() {
            let mut out = vec![0.0; if kind == 0 { length * self.ranks } else { length }];
            work.wait_into(&mut out).unwrap();
            match kind {
                0 => {
                    let expected: Vec<f32> = (0..self.ranks).flat_map(|rank| values(salt, rank, length)).collect();
                    self.check(out == expected, format!("started all_gather of {length}"));
                }
                1 => {
                    let at = self.rank * length;
                    let right =
                        (0..length).all(|i| out[i].to_bits() == sum_of::<f32>(salt, self.ranks, at + i).to_bits());
                    self.check(right, format!("started reduce_scatter to {length}"));
                }
                _ => self.check_values("started all_reduce", &out, |i| sum_of::<f32>(salt, self.ranks, i)),
            }
        }
    }

    pub(super) fn groups(&self) {
        // Everyone, in reverse.
        let all = self.world.split(self.tag(), Some(7), self.ranks - self.rank).unwrap().unwrap();
        self.check((all.rank(), all.world()) == (self.ranks - 1 - self.rank, self.ranks), "ranks ordered by key");
        self.group_works(&all);

        // Equal keys keep the order of ranks; rank 0 takes part and gets none.
        let color = (self.rank > 0).then_some(self.rank % 2);
        let half = self.world.split(self.tag(), color, 0).unwrap();
        self.check(half.is_some() == color.is_some(), "a group for each colour, none for none");
        if let Some(half) = half {
            let members: Vec<usize> = (1..self.ranks).filter(|rank| rank % 2 == self.rank % 2).collect();
            self.check(half.world() == members.len() && members[half.rank()] == self.rank, "ranks ordered by rank");
            self.group_works(&half);

            // A group of a group: each alone.
            let alone = half.split(self.tag(), Some(half.rank()), 0).unwrap().unwrap();
            self.check((alone.rank(), alone.world()) == (0, 1), "a group of one");
            self.group_works(&alone);
        } else {
            // The tags go on alike on all ranks.
            self.tag();
        }
        // Nobody wants a group.
        self.check(self.world.split(self.tag(), None, 0).unwrap().is_none(), "no group at all");
        self.world.barrier(self.tag()).unwrap();
    }

    /// A group is a communicator like another.
    fn group_works(&self, group: &Arc<dyn Collective>) {
        let suite = self.on(group);
        for length in [3, 20_000] {
            let mut mine = values::<f32>(5, group.rank(), length);
            group.all_reduce_sum_f32(suite.tag(), &mut mine).unwrap();
            suite.check_values("all_reduce in a group", &mine, |i| sum_of::<f32>(5, group.world(), i));
        }
        let topology = group.topology();
        suite.check(topology.world() == group.world(), "the topology of a group");
        let mut nodes = vec![0; group.world() * 8];
        let mine = self.world.topology().node_of(self.rank) as u64;
        group.all_gather(suite.tag(), &mine.to_ne_bytes(), &mut nodes).unwrap();
        let right = nodes.chunks_exact(8).enumerate().all(|(rank, node)| {
            (node == mine.to_ne_bytes()) == (topology.node_of(rank) == topology.node_of(group.rank()))
        });
        suite.check(right, "members share a node in the group if they do in the world");
        let work = group.start_all_gather_f32(suite.tag(), Arc::new(vec![group.rank() as f32])).unwrap();
        let mut out = vec![0.0; group.world()];
        work.wait_into(&mut out).unwrap();
        suite.check_values("started all_gather in a group", &out, |i| i as f32);
        self.checks.set(self.checks.get() + 1);
    }

    /// Summed over the ranks, what was sent is what was received, and both are what the operation must move.
    pub(super) fn traffic(&self) {
        let n = 100_000 * self.ranks;
        let others = (self.ranks - 1) as u64;
        let total = |elements: u64| others * elements;
        let (elements, all) = (n as u64, self.ranks as u64);
        self.moved("all_reduce_sum_f32", 2 * total(elements) * 4, || {
            self.world.all_reduce_sum_f32(self.tag(), &mut vec![1.0; n]).unwrap();
        });
        self.moved("reduce_scatter_sum_f32", total(elements) * 4, || {
            self.world.reduce_scatter_sum_f32(self.tag(), &vec![1.0; n], &mut vec![0.0; n / self.ranks]).unwrap();
        });
        self.moved("all_gather", total(elements) * all, || {
            self.world.all_gather(self.tag(), &vec![1; n], &mut vec![0; n * self.ranks]).unwrap();
        });
        self.moved("all_to_all", total(elements), || {
            self.world.all_to_all(self.tag(), &vec![1; n], &mut vec![0; n]).unwrap();
        });
        self.moved("broadcast", total(elements), || {
            self.world.broadcast(self.tag(), &mut vec![1; n], self.ranks - 1).unwrap();
        });
        self.moved("started all_gather", total(elements) * 4 * all, || {
            let work = self.world.start_all_gather_f32(self.tag(), Arc::new(vec![1.0_f32; n])).unwrap();
            work.wait_into(&mut vec![0.0; n * self.ranks]).unwrap();
        });
        self.moved("started reduce_scatter", total(elements) * 4, || {
            let work = self.world.start_reduce_scatter_sum_f32(self.tag(), Arc::new(vec![1.0_f32; n])).unwrap();
            work.wait_into(&mut vec![0.0; n / self.ranks]).unwrap();
        });
        self.moved("a message around the ring", if self.ranks > 1 { all * elements } else { 0 }, || {
            let tag = self.tag();
            self.world.send(tag, vec![1; n], (self.rank + 1) % self.ranks).unwrap();
            self.world.receive(tag, &mut vec![0; n], (self.rank + self.ranks - 1) % self.ranks).unwrap();
        });
    }

    fn moved(&self, what: &str, expected_bytes: u64, call: impl FnOnce()) {
        let before = self.world.traffic();
        call();
        let moved = self.world.traffic().since(before);
        self.check(moved.calls > 0, format!("{what} is counted as a call"));
        let mut sums = [moved.sent_bytes as f64, moved.received_bytes as f64];
        self.world.all_reduce_sum_f64(self.tag(), &mut sums).unwrap();
        let expected = [expected_bytes as f64; 2];
        self.check(sums == expected, format!("{what}: {sums:?} bytes were sent and received, not {expected:?}"));
    }
}
