//! The Philox4x32-10 bijection, with the constants of the paper's table 2.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
/// Added to the key each round: the golden ratio and the square root of 3, less 1.
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// Philox4x32-10: 128 random bits from a counter and a key.
#[inline]
pub fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    let [mut k0, mut k1] = key;
    for _ in 0..ROUNDS {
        let first = u64::from(c0) * u64::from(MULTIPLIERS[0]);
        let second = u64::from(c2) * u64::from(MULTIPLIERS[1]);
        (c0, c1, c2, c3) =
            ((second >> 32) as u32 ^ c1 ^ k0, second as u32, (first >> 32) as u32 ^ c3 ^ k1, first as u32);
        k0 = k0.wrapping_add(WEYL[0]);
        k1 = k1.wrapping_add(WEYL[1]);
    }
    [c0, c1, c2, c3]
}

/// [`philox4x32`] of `N` counters at once, word by word: `counter[i][lane]` is word `i` of counter `lane`.
#[inline(always)]
pub(crate) fn philox4x32_lanes<const N: usize>(counter: [[u32; N]; 4], key: [u32; 2]) -> [[u32; N]; 4] {
    let mut c = counter;
    let [mut k0, mut k1] = key;
    for _ in 0..ROUNDS {
        for lane in 0..N {
            let first = u64::from(c[0][lane]) * u64::from(MULTIPLIERS[0]);
            let second = u64::from(c[2][lane]) * u64::from(MULTIPLIERS[1]);
            c[0][lane] = (second >> 32) as u32 ^ c[1][lane] ^ k0;
            c[1][lane] = second as u32;
            c[2][lane] = (first >> 32) as u32 ^ c[3][lane] ^ k1;
            c[3][lane] = first as u32;
        }
        k0 = k0.wrapping_add(WEYL[0]);
        k1 = k1.wrapping_add(WEYL[1]);
    }
    c
}
