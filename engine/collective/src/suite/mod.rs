//! What every backend must do, as one program that any backend's tests can run.
//!
//! [`conformance`] compares every operation with a serial fold written down here once more, bit for bit. It is itself a
//! collective call: all ranks of a world run it together. It panics at the first thing that is wrong, as a test does.

mod groups;
mod moves;
mod reductions;

use std::cell::Cell;
use std::sync::Arc;

use crate::bytes::{Plain, as_bytes};
use crate::collective::Collective;
use crate::tag::Tag;

/// The lengths that are tried: none, one, fewer than ranks, some, and more than any internal block, with a remainder.
pub(crate) const LENGTHS: [usize; 5] = [0, 1, 3, 1000, 100_003];

/// Runs the whole suite and returns the number of checks that this rank has made (ranks that a split leaves out make fewer).
///
/// # Panics
/// If the backend does not conform.
pub fn conformance(world: &Arc<dyn Collective>) -> usize {
    let checks = results(world);
    let suite = Suite::new(world);
    suite.traffic();
    checks + suite.checks.get()
}

/// [`conformance`] without the count of bytes: for communicators that move them in another way.
///
/// # Panics
/// If the backend does not conform.
pub fn results(world: &Arc<dyn Collective>) -> usize {
    let suite = Suite::new(world);
    suite.identity();
    suite.reductions();
    suite.scattered_reductions();
    suite.special_values();
    suite.gathers();
    suite.exchanges();
    suite.broadcasts();
    suite.agreement();
    suite.messages();
    suite.started_operations();
    suite.lent_values();
    suite.groups();
    suite.checks.get()
}

/// A world under test.
pub(crate) struct Suite<'a> {
    pub(crate) world: &'a Arc<dyn Collective>,
    pub(crate) rank: usize,
    pub(crate) ranks: usize,
    checks: Cell<usize>,
    sequence: Cell<u64>,
}

impl<'a> Suite<'a> {
    fn new(world: &'a Arc<dyn Collective>) -> Self {
        let (rank, ranks) = (world.rank(), world.world());
        Self { world, rank, ranks, checks: Cell::new(0), sequence: Cell::new(0) }
    }

    /// A suite on a group, that goes on counting where this one is.
    fn on<'b>(&self, group: &'b Arc<dyn Collective>) -> Suite<'b> {
        Suite { sequence: Cell::new(self.sequence.get()), ..Suite::new(group) }
    }

    /// A tag for the next call.
    pub(crate) fn tag(&self) -> Tag {
        self.sequence.set(self.sequence.get() + 1);
        Tag::new("conformance", self.sequence.get())
    }

    /// Counts a check, which fails with `what`.
    pub(crate) fn check(&self, holds: bool, what: impl std::fmt::Display) {
        assert!(holds, "rank {} of {} ({}): {what}", self.rank, self.ranks, self.world.backend());
        self.checks.set(self.checks.get() + 1);
    }

    /// Checks that `values` has the bits of `expected`; one NaN is as good as another.
    pub(crate) fn check_values<T: Number>(&self, what: &str, values: &[T], expected: impl Fn(usize) -> T) {
        for (i, value) in values.iter().enumerate() {
            let wanted = expected(i);
            let same = value.bits() == wanted.bits() || (value.is_nan() && wanted.is_nan());
            assert!(same, "rank {} of {}: {what}: element {i} is {value:?}, not {wanted:?}", self.rank, self.ranks);
        }
        self.checks.set(self.checks.get() + 1);
        self.same_everywhere_numbers(what, values);
    }

    /// Checks that all ranks hold the same bits.
    pub(crate) fn same_everywhere<T: Plain>(&self, what: &str, values: &[T]) {
        self.same_digest(what, digest(as_bytes(values)));
    }

    fn same_everywhere_numbers<T: Number>(&self, what: &str, values: &[T]) {
        let canonical: Vec<u64> =
            values.iter().map(|value| if value.is_nan() { u64::MAX } else { value.bits() }).collect();
        self.same_digest(what, digest(as_bytes(&canonical)));
    }

    fn same_digest(&self, what: &str, mine: u64) {
        let mut all = vec![0; 8 * self.ranks];
        self.world
            .all_gather(self.tag(), &mine.to_ne_bytes(), &mut all)
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        self.check(
            all.chunks_exact(8).all(|other| other == mine.to_ne_bytes()),
            format!("{what} differs between ranks"),
        );
    }

    fn identity(&self) {
        self.check(self.rank < self.ranks, "the rank is in the world");
        let topology = self.world.topology();
        self.check(topology.world() == self.ranks, "the topology knows all ranks");
        let nodes: Vec<u64> = (0..self.ranks).map(|rank| topology.node_of(rank) as u64).collect();
        self.same_everywhere("the topology", &nodes);
        let mut ranks = vec![0; 8 * self.ranks];
        self.world.all_gather(self.tag(), &(self.rank as u64).to_ne_bytes(), &mut ranks).unwrap();
        let expected: Vec<u8> = (0..self.ranks as u64).flat_map(u64::to_ne_bytes).collect();
        self.check(ranks == expected, "ranks are numbered in the order of an all_gather");
    }
}

/// FNV-1a.
pub(crate) fn digest(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// A number that depends on where it stands and on who holds it; all bits matter.
pub(crate) fn noise(salt: usize, rank: usize, i: usize) -> u64 {
    let mut x = (salt as u64) << 48 ^ (rank as u64) << 32 ^ i as u64;
    for multiplier in [0xff51_afd7_ed55_8ccd_u64, 0xc4ce_b9fe_1a85_ec53] {
        x = (x ^ x >> 33).wrapping_mul(multiplier);
    }
    x ^ x >> 33
}

/// A number of the suite: can be made from noise, compared by bits, and folded.
pub(crate) trait Number: Plain + std::fmt::Debug + Default {
    /// What the tree is folded in.
    type Wide: Copy;

    /// Noise of any sign over many magnitudes, so that the order of additions shows.
    fn from_noise(noise: u64) -> Self;
    fn widen(self) -> Self::Wide;
    fn add(left: Self::Wide, right: Self::Wide) -> Self::Wide;
    fn narrow(wide: Self::Wide) -> Self;
    fn bits(self) -> u64;
    fn is_nan(self) -> bool;
}

macro_rules! number {
    ($number:ty, $wide:ty, $widen:expr, $narrow:expr) => {
        impl Number for $number {
            type Wide = $wide;

            fn from_noise(noise: u64) -> Self {
                let unit = (noise >> 11) as f64 / (1_u64 << 53) as f64 - 0.5;
                // Two to the power of -20 to 20, by its bits.
                let scaled = unit * f64::from_bits((1023 - 20 + noise % 41) << 52);
                $narrow(scaled as $wide)
            }
            fn widen(self) -> $wide {
                $widen(self)
            }
            fn add(left: $wide, right: $wide) -> $wide {
                left + right
            }
            fn narrow(wide: $wide) -> Self {
                $narrow(wide)
            }
            fn bits(self) -> u64 {
                u64::from(self.to_bits())
            }
            fn is_nan(self) -> bool {
                self != self
            }
        }
    };
}
number!(f32, f32, |x| x, |x| x);
number!(f64, f64, |x| x, |x| x);
number!(half::bf16, f32, half::bf16::to_f32, half::bf16::from_f32);

/// The values of `rank`.
pub(crate) fn values<T: Number>(salt: usize, rank: usize, length: usize) -> Vec<T> {
    (0..length).map(|i| T::from_noise(noise(salt, rank, i))).collect()
}

/// The bytes of `rank`.
pub(crate) fn some_bytes(salt: usize, rank: usize, length: usize) -> Vec<u8> {
    (0..length).map(|i| noise(salt, rank, i) as u8).collect()
}

/// The tree over ranks `lo..hi`, as the crate documentation words it.
fn fold<W: Copy>(lo: usize, hi: usize, at: &impl Fn(usize) -> W, join: &impl Fn(W, W) -> W) -> W {
    if hi - lo == 1 {
        return at(lo);
    }
    let mut mid = lo + 1;
    while 2 * (mid - lo) < hi - lo {
        mid = lo + 2 * (mid - lo);
    }
    join(fold(lo, mid, at, join), fold(mid, hi, at, join))
}

/// Element `i` of the sum over `ranks` ranks of `values(salt, rank, _)`.
pub(crate) fn sum_of<T: Number>(salt: usize, ranks: usize, i: usize) -> T {
    T::narrow(fold(0, ranks, &|rank| T::from_noise(noise(salt, rank, i)).widen(), &T::add))
}
