//! Calls that only move bytes, and messages.

use super::{LENGTHS, Suite, noise, some_bytes, values};
use crate::error::Error;
use crate::status::Status;
use crate::tag::Tag;

impl Suite<'_> {
    pub(super) fn gathers(&self) {
        for (salt, length) in LENGTHS.into_iter().enumerate() {
            let mut all = vec![0; length * self.ranks];
            self.world.all_gather(self.tag(), &some_bytes(salt, self.rank, length), &mut all).unwrap();
            let expected: Vec<u8> = (0..self.ranks).flat_map(|rank| some_bytes(salt, rank, length)).collect();
            self.check(all == expected, format!("all_gather of {length} bytes"));

            let mut all = vec![0.0; length * self.ranks];
            self.world.all_gather_f32(self.tag(), &values(salt, self.rank, length), &mut all).unwrap();
            let expected: Vec<f32> = (0..self.ranks).flat_map(|rank| values(salt, rank, length)).collect();
            self.check_values("all_gather_f32", &all, |i| expected[i]);

            // Every rank another length; in one of the rounds each rank has nothing.
            let part = |rank: usize| some_bytes(salt, rank, if rank == salt % self.ranks { 0 } else { length + rank });
            let all = self.world.all_gather_varied(self.tag(), &part(self.rank)).unwrap();
            let expected: Vec<Vec<u8>> = (0..self.ranks).map(part).collect();
            self.check(all == expected, format!("all_gather_varied around {length} bytes"));
        }
        let error = self.world.all_gather(self.tag(), &[1, 2], &mut [0]).unwrap_err();
        self.check(matches!(error, Error::WrongLength { .. }), error);
    }

    pub(super) fn exchanges(&self) {
        for (salt, length) in LENGTHS.into_iter().enumerate() {
            let mut received = vec![0; length * self.ranks];
            self.world
                .all_to_all(self.tag(), &some_bytes(salt, self.rank, length * self.ranks), &mut received)
                .unwrap();
            let right = received.iter().enumerate().all(|(i, &byte)| {
                let (from, at) = (i / length, i % length);
                byte == noise(salt, from, self.rank * length + at) as u8
            });
            self.check(right, format!("all_to_all of {length} bytes to each"));
        }
    }

    pub(super) fn broadcasts(&self) {
        for root in 0..self.ranks {
            for (salt, length) in LENGTHS.into_iter().enumerate() {
                let mut bytes = some_bytes(salt, self.rank, length);
                self.world.broadcast(self.tag(), &mut bytes, root).unwrap();
                self.check(bytes == some_bytes(salt, root, length), format!("broadcast of {length} bytes from {root}"));
            }
        }
        let tag = self.tag();
        let error = self.world.broadcast(tag, &mut [], self.ranks).unwrap_err();
        self.check(error == Error::NoSuchRank { tag, root: self.ranks, world: self.ranks }, error);
    }

    pub(super) fn agreement(&self) {
        for worst in [Status::Healthy, Status::SkipStep, Status::Stop, Status::Failed] {
            for bad in 0..self.ranks {
                let mine = if self.rank == bad { worst } else { Status::Healthy };
                let agreed = self.world.agree(self.tag(), mine).unwrap();
                self.check(agreed == worst, format!("{agreed:?} was agreed where rank {bad} is {worst:?}"));
                self.world.barrier(self.tag()).unwrap();
            }
        }
    }

    pub(super) fn messages(&self) {
        let (next, previous) = ((self.rank + 1) % self.ranks, (self.rank + self.ranks - 1) % self.ranks);
        for (salt, length) in LENGTHS.into_iter().enumerate() {
            let tag = self.tag();
            // Around the ring: everyone sends before anyone receives, so a send must not wait.
            self.world.send(tag, some_bytes(salt, self.rank, length), next).unwrap();
            let mut bytes = vec![0; length];
            self.world.receive(tag, &mut bytes, previous).unwrap();
            self.check(bytes == some_bytes(salt, previous, length), format!("{length} bytes around the ring"));

            // Crossing: everyone to everyone (itself too), twice, received from the last rank to the first.
            let (first, second) = (Tag::new("crossing", tag.sequence), Tag::new("crossing again", tag.sequence));
            for to in 0..self.ranks {
                self.world.send(first, some_bytes(to, self.rank, length), to).unwrap();
                self.world.send(second, some_bytes(to + 99, self.rank, length), to).unwrap();
            }
            for from in (0..self.ranks).rev() {
                for (tag, salt) in [(first, self.rank), (second, self.rank + 99)] {
                    self.world.receive(tag, &mut bytes, from).unwrap();
                    self.check(bytes == some_bytes(salt, from, length), format!("{length} crossing bytes from {from}"));
                }
            }
        }
        let error = self.world.send(self.tag(), vec![], self.ranks).unwrap_err();
        self.check(matches!(error, Error::NoSuchRank { .. }), error);
        let error = self.world.receive(self.tag(), &mut [], self.ranks).unwrap_err();
        self.check(matches!(error, Error::NoSuchRank { .. }), error);
    }
}
