//! Signs as bits: eight to a byte, the first in the most significant bit, one for `+`.

/// Writes the signs of `values` to `bits`: 1 where `value >= 0` (so for both zeros), 0 where it is negative or NaN. A last
/// byte that is not full ends in zeros.
///
/// # Panics
/// If `bits.len() != values.len().div_ceil(8)`.
pub fn pack_signs(values: &[f32], bits: &mut [u8]) {
    assert_eq!(bits.len(), values.len().div_ceil(8), "eight signs to a byte");
    for (byte, eight) in bits.iter_mut().zip(values.chunks(8)) {
        *byte = eight.iter().enumerate().fold(0, |byte, (i, &value)| byte | u8::from(value >= 0.0) << (7 - i));
    }
}

/// Writes `scale` to `values` where the bit is 1 and `-scale` where it is 0.
///
/// # Panics
/// If `bits.len() != values.len().div_ceil(8)`.
pub fn unpack_signs(bits: &[u8], scale: f32, values: &mut [f32]) {
    assert_eq!(bits.len(), values.len().div_ceil(8), "eight signs to a byte");
    for (&byte, eight) in bits.iter().zip(values.chunks_mut(8)) {
        for (i, value) in eight.iter_mut().enumerate() {
            // The sign bit is turned where ours is 0.
            *value = f32::from_bits(scale.to_bits() ^ (u32::from(!byte >> (7 - i) & 1) << 31));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_sign_is_the_most_significant_bit() {
        let values = [1.0, -1.0, 0.0, -0.0, f32::NAN, f32::NEG_INFINITY, -2.0, 3.0, -1.0, 5.0];
        let mut bits = [0xff; 2];
        pack_signs(&values, &mut bits);
        assert_eq!(bits, [0b1011_0001, 0b0100_0000]);
        let mut back = [0.0; 10];
        unpack_signs(&bits, 2.5, &mut back);
        assert_eq!(back, [2.5, -2.5, 2.5, 2.5, -2.5, -2.5, -2.5, 2.5, -2.5, 2.5]);
        pack_signs(&[], &mut []);
        unpack_signs(&[], 1.0, &mut []);
    }
}
