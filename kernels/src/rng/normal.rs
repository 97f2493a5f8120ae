//! Normal draws from blocks of bits (Box and Muller, 1958): two from each block, in f64.

use rayon::prelude::*;

use super::{Philox, halves, unit};

/// Elements filled by one task; even, so that a pair never straddles two tasks.
const CHUNK: usize = 4096;

/// Two independent standard normal draws.
pub(super) fn pair(block: [u32; 4]) -> [f64; 2] {
    // 1 - [0, 1) is (0, 1]: the logarithm stays finite.
    let radius = (-2.0 * (1.0 - unit(block[0], block[1])).ln()).sqrt();
    let (sin, cos) = (std::f64::consts::TAU * unit(block[2], block[3])).sin_cos();
    [radius * cos, radius * sin]
}

/// See [`Philox::fill_normal`]. Elements `2i` and `2i + 1` come from block `i`.
pub(super) fn fill(rng: &Philox, sample: u64, first: usize, std: f64, out: &mut [f32]) {
    out.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, out)| {
        let start = first + chunk * CHUNK;
        let mut index = start;
        while index < start + out.len() {
            let [counter, position] = halves(index as u64 / 2);
            let draws = pair(rng.block(sample, position, counter));
            for &draw in &draws[index % 2..] {
                if let Some(slot) = out.get_mut(index - start) {
                    *slot = (std * draw) as f32;
                }
                index += 1;
            }
        }
    });
}
