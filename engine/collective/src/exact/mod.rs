//! Sums that do not depend on the order of their terms.
//!
//! An [`ExactSum`] is a fixed-point number wide enough for every f64: adding is exact, so any order, any grouping over ranks
//! and micro-batches gives the same bits, and [`ExactSum::value`] rounds once. For losses, norms and counts that must not
//! change when the number of ranks does.

use crate::collective::Collective;
use crate::error::{Error, Result};
use crate::tag::Tag;

/// Bits of a digit; the rest of its i64 holds carries.
const DIGIT_BITS: usize = 32;
/// 2098 bits from the least subnormal to the greatest finite number, 64 for the sums of many of those, 32 to end on a digit
/// that holds only the sign.
const DIGITS: usize = (2098 + 64) / DIGIT_BITS + 2;
/// Each addition changes a digit by less than 2^32, so after so many the i64 may be near its end.
const ADDITIONS: u32 = 1 << 30;
/// The bytes of [`ExactSum::to_bytes`].
const BYTES: usize = DIGITS * 4 + 1;

/// An exact sum of f64 values, in 560 bytes.
///
/// Infinities and NaN are remembered: the value is what IEEE addition in any order would come to (opposite infinities give
/// NaN). More than 2^63 terms are not counted on.
#[derive(Debug, Clone, Copy)]
pub struct ExactSum {
    /// `sum(digits[i] * 2^(32 i)) * 2^-1074`, two's complement over digits: after carrying all but the last are `0..2^32`.
    digits: [i64; DIGITS],
    additions: u32,
    special: u8,
}

const POSITIVE_INFINITY: u8 = 1;
const NEGATIVE_INFINITY: u8 = 2;
const NAN: u8 = 4;

impl ExactSum {
    /// Nothing, which is `+0.0`.
    pub const fn new() -> Self {
        Self { digits: [0; DIGITS], additions: 0, special: 0 }
    }

    /// Adds one value, exactly.
    pub fn add(&mut self, value: f64) {
        let bits = value.to_bits();
        let exponent = (bits >> 52 & 0x7ff) as usize;
        let fraction = bits & ((1 << 52) - 1);
        let negative = value.is_sign_negative();
        if exponent == 0x7ff {
            self.special |= match (fraction, negative) {
                (0, false) => POSITIVE_INFINITY,
                (0, true) => NEGATIVE_INFINITY,
                _ => NAN,
            };
            return;
        }
        // A normal number has a hidden bit; a subnormal one has the scale of the least normal exponent.
        let (mantissa, shift) = if exponent == 0 { (fraction, 0) } else { (fraction | 1 << 52, exponent - 1) };
        let (first, offset) = (shift / DIGIT_BITS, shift % DIGIT_BITS);
        let wide = u128::from(mantissa) << offset;
        for (i, digit) in self.digits[first..first + 3].iter_mut().enumerate() {
            let part = (wide >> (DIGIT_BITS * i)) as u32;
            *digit += if negative { -i64::from(part) } else { i64::from(part) };
        }
        self.additions += 1;
        if self.additions >= ADDITIONS {
            self.carry();
        }
    }

    /// Adds another sum, exactly.
    pub fn merge(&mut self, other: &Self) {
        let mut other = *other;
        other.carry();
        self.carry();
        for (digit, more) in self.digits.iter_mut().zip(other.digits) {
            *digit += more;
        }
        self.special |= other.special;
        self.carry();
    }

    /// Brings all digits but the last, which has the sign, into `0..2^32`: one form for one number.
    fn carry(&mut self) {
        let mut carry = 0;
        for digit in &mut self.digits[..DIGITS - 1] {
            let sum = *digit + carry;
            *digit = sum & 0xffff_ffff;
            carry = sum >> DIGIT_BITS;
        }
        self.digits[DIGITS - 1] += carry;
        self.additions = 0;
    }

    /// The sum, rounded once to the nearest f64, ties to even. An exact zero is `+0.0`; what is too large is infinite.
    pub fn value(&self) -> f64 {
        match self.special {
            0 => {}
            POSITIVE_INFINITY => return f64::INFINITY,
            NEGATIVE_INFINITY => return f64::NEG_INFINITY,
            _ => return f64::NAN,
        }
        let mut magnitude = *self;
        magnitude.carry();
        let negative = magnitude.digits[DIGITS - 1] < 0;
        if negative {
            for digit in &mut magnitude.digits {
                *digit = -*digit;
            }
            magnitude.carry();
        }
        let value = magnitude.round();
        if negative { -value } else { value }
    }

    /// The value of a number that has been carried and is not negative.
    fn round(&self) -> f64 {
        let Some(top) = self.digits.iter().rposition(|&digit| digit != 0) else { return 0.0 };
        let top_bit = top * DIGIT_BITS + (63 - self.digits[top].leading_zeros() as usize);
        if top_bit < 53 {
            // All of it fits a mantissa, at the scale of the subnormals: the bits are those of the number.
            return f64::from_bits(self.bits_from(0));
        }
        // The mantissa is bits low..=top_bit, 53 of them; what is below decides the rounding.
        let low = top_bit - 52;
        let mantissa = self.bits_from(low) & ((1 << 53) - 1);
        let half = self.bits_from(low - 1) & 1 == 1;
        let rest = (0..low - 1).any(|bit| self.digits[bit / DIGIT_BITS] >> (bit % DIGIT_BITS) & 1 == 1);
        let up = half && (rest || mantissa & 1 == 1);
        // Bit `low` has exponent field `low + 1`; the hidden bit carries into it, and so does the rounding.
        let exponent = low as u64 + 1;
        if exponent >= 0x7ff {
            return f64::INFINITY;
        }
        f64::from_bits(((exponent - 1) << 52) + mantissa + u64::from(up))
    }

    /// 64 bits from bit `low` on.
    fn bits_from(&self, low: usize) -> u64 {
        let (first, offset) = (low / DIGIT_BITS, low % DIGIT_BITS);
        let digit = |i: usize| u128::from(self.digits.get(i).copied().unwrap_or(0) as u32);
        let wide = digit(first) | digit(first + 1) << 32 | digit(first + 2) << 64;
        (wide >> offset) as u64
    }

    /// The sum in [`Self::BYTES`] bytes, the same on every machine and for every way that led to this sum.
    pub fn to_bytes(&self) -> [u8; BYTES] {
        let mut carried = *self;
        carried.carry();
        let mut bytes = [0; BYTES];
        for (digit, four) in carried.digits.iter().zip(bytes.chunks_exact_mut(4)) {
            // The last digit has the sign and stays within an i32: the 64 bits below it take more sums than can be made.
            four.copy_from_slice(&(*digit as u32).to_le_bytes());
        }
        bytes[BYTES - 1] = carried.special;
        bytes
    }

    /// The length of [`Self::to_bytes`].
    pub const BYTES: usize = BYTES;

    /// The sum that [`Self::to_bytes`] has written; `None` for other bytes.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (&special, digits) = bytes.split_last()?;
        if bytes.len() != BYTES || special > (POSITIVE_INFINITY | NEGATIVE_INFINITY | NAN) {
            return None;
        }
        let mut sum = Self { special, ..Self::new() };
        for (digit, four) in sum.digits.iter_mut().zip(digits.chunks_exact(4)) {
            *digit = i64::from(u32::from_le_bytes([four[0], four[1], four[2], four[3]]));
        }
        let last = &mut sum.digits[DIGITS - 1];
        *last = i64::from(*last as u32 as i32);
        Some(sum)
    }
}

/// Equal if the sums are, however they were made.
impl PartialEq for ExactSum {
    fn eq(&self, other: &Self) -> bool {
        self.to_bytes() == other.to_bytes()
    }
}

impl Eq for ExactSum {}

impl Default for ExactSum {
    fn default() -> Self {
        Self::new()
    }
}

impl Extend<f64> for ExactSum {
    fn extend<I: IntoIterator<Item = f64>>(&mut self, values: I) {
        values.into_iter().for_each(|value| self.add(value));
    }
}

/// Replaces each of `sums` on every rank by its sum over the ranks, exactly: the result does not depend on how terms were
/// spread over ranks. All ranks bring equally many.
///
/// # Errors
/// As any call of [`Collective`]; [`Error::PeerFailed`] if a peer sends what is no sum.
pub fn all_reduce_exact(world: &dyn Collective, tag: Tag, sums: &mut [ExactSum]) -> Result<()> {
    let mine: Vec<u8> = sums.iter().flat_map(ExactSum::to_bytes).collect();
    let mut all = vec![0; mine.len() * world.world()];
    world.all_gather(tag, &mine, &mut all)?;
    sums.fill(ExactSum::new());
    for (at, bytes) in all.chunks_exact(BYTES).enumerate() {
        let (peer, index) = (at / sums.len(), at % sums.len());
        let Some(other) = ExactSum::from_bytes(bytes) else {
            let why = format!("its sum number {index} in {tag} is damaged");
            world.abort(&why);
            return Err(Error::PeerFailed { rank: world.rank(), peer, why });
        };
        sums[index].merge(&other);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
