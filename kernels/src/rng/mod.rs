//! Random numbers by address: a pure function of (seed, purpose, step, sample, position, counter).
//!
//! The generator is Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
//! SC 2011). It has no state, so a draw depends neither on what was drawn before it nor on where it runs, and resuming
//! needs nothing saved.
//!
//! Packing of an address into the 128-bit counter and the 64-bit key:
//!
//! | word | holds |
//! |---|---|
//! | counter 0, 1 | `sample`, low half first |
//! | counter 2 | `position` |
//! | counter 3 | `counter` |
//! | key 0, 1 | `mix(mix(seed) ^ (purpose << 56 \| step))`, low half first |
//!
//! `mix` is a bijection of 64-bit words, and so is Philox for a given key. Under one seed, two addresses with steps
//! below 2^56 therefore never share both key and counter. Different seeds meet in a key with probability 2^-64 a pair.

mod normal;
mod philox;

use self::philox::philox4x32_lanes;
pub use philox::philox4x32;

/// What random numbers are for: streams of different purposes are unrelated.
///
/// The values are part of the meaning of a seed: adding a purpose is fine, renumbering changes every run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[repr(u8)]
pub enum Purpose {
    /// Initial weights.
    Init = 1,
    /// Order of the rows of an epoch.
    Order = 2,
    /// Choice of the next token.
    Sample = 3,
    /// Dropout masks.
    Dropout = 4,
    /// Assignment of rows to phases or to the held-out part.
    Split = 5,
    /// Choice among blended sources.
    Blend = 6,
}

/// One stream of random blocks, addressed by (sample, position, counter).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Philox {
    key: [u32; 2],
}

impl Philox {
    /// The stream of `purpose` at `step` under `seed`. Steps count below 2^56.
    pub fn new(seed: u64, purpose: Purpose, step: u64) -> Self {
        let key = mix(mix(seed) ^ ((purpose as u64) << 56) ^ step);
        Self { key: halves(key) }
    }

    /// 128 random bits at an address.
    #[inline]
    pub fn block(&self, sample: u64, position: u32, counter: u32) -> [u32; 4] {
        let [low, high] = halves(sample);
        philox4x32([low, high, position, counter], self.key)
    }

    /// [`Philox::block`] of `N` consecutive counters, word by word.
    #[inline(always)]
    pub(crate) fn blocks<const N: usize>(&self, sample: u64, position: u32, first: u32) -> [[u32; N]; 4] {
        let [low, high] = halves(sample);
        let counters = std::array::from_fn(|lane| first.wrapping_add(lane as u32));
        philox4x32_lanes([[low; N], [high; N], [position; N], counters], self.key)
    }

    /// A number in `[0, 1)` with 53 random bits.
    #[inline]
    pub fn uniform(&self, sample: u64, position: u32, counter: u32) -> f64 {
        let [low, high, ..] = self.block(sample, position, counter);
        unit(low, high)
    }

    /// A draw from the standard normal distribution.
    #[inline]
    pub fn normal(&self, sample: u64, position: u32, counter: u32) -> f64 {
        normal::pair(self.block(sample, position, counter))[0]
    }

    /// Fills `out` with draws from the normal distribution of mean 0 and standard deviation `std`.
    ///
    /// Element `i` depends on (`sample`, `i`) only, so a slice of a tensor can be filled alone: `first` is the index of
    /// `out[0]` in the whole.
    pub fn fill_normal(&self, sample: u64, first: usize, std: f64, out: &mut [f32]) {
        normal::fill(self, sample, first, std, out);
    }

    /// A number in `0..bound` (0 if `bound` is 0), uniform up to a bias below `bound / 2^64`.
    #[inline]
    pub fn below(&self, bound: u64, sample: u64, position: u32, counter: u32) -> u64 {
        let [low, high, ..] = self.block(sample, position, counter);
        ((u128::from(word(low, high)) * u128::from(bound)) >> 64) as u64
    }

    /// A random permutation of `0..len` (Fisher and Yates), one per `sample`.
    pub fn shuffle(&self, len: usize, sample: u64) -> Vec<usize> {
        let mut order: Vec<usize> = (0..len).collect();
        for last in (1..len).rev() {
            let [counter, position] = halves(last as u64);
            order.swap(last, self.below(last as u64 + 1, sample, position, counter) as usize);
        }
        order
    }
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): a bijection that spreads every bit over all.
fn mix(mut word: u64) -> u64 {
    word = word.wrapping_add(0x9E37_79B9_7F4A_7C15);
    word = (word ^ (word >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    word ^ (word >> 31)
}

/// Low and high half of a word.
#[inline]
fn halves(word: u64) -> [u32; 2] {
    [word as u32, (word >> 32) as u32]
}

/// The inverse of [`halves`].
#[inline]
fn word(low: u32, high: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

/// The top 53 bits of a word as a multiple of 2^-53 in `[0, 1)`.
#[inline]
fn unit(low: u32, high: u32) -> f64 {
    (word(low, high) >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}
