//! The mean over the ranks in one bit per number, with error feedback on both sides.
//!
//! Source: Tang et al., "1-bit Adam", 2021, and DeepSpeed's `compressed_allreduce`. Of `n` numbers (padded), each of `N` ranks
//! serves a chunk of `c = n / N`:
//!
//! ```text
//! x += worker_error;  s = |x| / sqrt(n);  q = sign(x);  worker_error = x - s q
//! all_to_all: bits of chunk j to rank j;  all_gather: s
//! y = (1/N) sum_i s_i q_i[chunk] + server_error;  S = |y| / sqrt(c);  Q = sign(y);  server_error = y - S Q
//! all_gather: bits of Q, scale S;  result[chunk j] = S_j Q_j
//! ```

use super::signs::{pack_signs, unpack_signs};
use crate::bytes::{as_bytes, as_bytes_mut};
use crate::collective::Collective;
use crate::error::{Result, check_length};
use crate::tag::Tag;
use crate::tree::tree_sum;

/// Numbers unpacked at a time, a multiple of eight.
const BLOCK: usize = 2048;

/// What one rank's signs have left out so far: the state between calls of [`compressed_all_reduce`].
#[derive(Debug, Clone, PartialEq)]
pub struct Compression {
    length: usize,
    world: usize,
    /// What this rank has not yet told of its own numbers, `[padded]`.
    pub worker_error: Vec<f32>,
    /// What this rank has not yet told of the mean that it serves, `[padded / world]`.
    pub server_error: Vec<f32>,
}

impl Compression {
    /// The state for buffers of `length` numbers in a world of `world` ranks: no error yet.
    ///
    /// # Panics
    /// If `world` is 0.
    pub fn new(length: usize, world: usize) -> Self {
        let padded = Self::padded(length, world);
        Self { length, world, worker_error: vec![0.0; padded], server_error: vec![0.0; padded / world] }
    }

    /// `length` rounded up to a multiple of `world * lcm(world, 8)`, as DeepSpeed pads.
    ///
    /// # Panics
    /// If `world` is 0.
    pub fn padded(length: usize, world: usize) -> usize {
        // The greatest common divisor of a number and 8 is its lowest bit, up to 8.
        let common = 1 << world.trailing_zeros().min(3);
        length.next_multiple_of(world * (world / common * 8))
    }

    /// The bytes that one call sends from this rank to its peers, and gets from them: about `length / 4`.
    pub fn wire_bytes(&self) -> u64 {
        let (others, chunk) = (self.world - 1, self.server_error.len());
        // The bits of the chunks of others, the scale, then the bits and scale of the own chunk, to each.
        (others * (chunk / 8 + 4 + chunk / 8 + 4)) as u64
    }

    /// Forgets the errors, as DeepSpeed does where training enters another stage.
    pub fn reset(&mut self) {
        self.worker_error.fill(0.0);
        self.server_error.fill(0.0);
    }
}

/// Replaces `values` on every rank by about their mean over the ranks, the same bits everywhere, and keeps in `state` what is
/// missing. Returns the bytes sent to peers (as many are received).
///
/// The numbers of one chunk all come out with one magnitude. A NaN or infinity anywhere makes everything NaN, for ever:
/// check before. After an error `state` is unspecified.
///
/// # Errors
/// As any call of [`Collective`]; [`WrongLength`](crate::Error::WrongLength) if `state` was made for another length or world.
pub fn compressed_all_reduce(
    world: &dyn Collective,
    tag: Tag,
    values: &mut [f32],
    state: &mut Compression,
) -> Result<u64> {
    let (ranks, rank) = (world.world(), world.rank());
    check_length(rank, tag, "the world of the compression state", ranks, state.world)?;
    check_length(rank, tag, "the buffer to compress", state.length, values.len())?;
    let (padded, chunk) = (state.worker_error.len(), state.server_error.len());
    if padded == 0 {
        return Ok(0);
    }

    for (error, value) in state.worker_error.iter_mut().zip(values.iter()) {
        *error += value;
    }
    let (scale, bits) = compress(&mut state.worker_error);
    let mut received = vec![0; padded / 8];
    world.all_to_all(tag, &bits, &mut received)?;
    let mut scales = vec![0.0; ranks];
    world.all_gather_f32(tag, &[scale], &mut scales)?;

    serve(&received, &scales, &mut state.server_error);
    let (scale, bits) = compress(&mut state.server_error);
    let mut all_bits = vec![0; padded / 8];
    world.all_gather(tag, &bits, &mut all_bits)?;
    world.all_gather(tag, as_bytes(&[scale]), as_bytes_mut(&mut scales))?;

    for ((to, bits), &scale) in values.chunks_mut(chunk).zip(all_bits.chunks_exact(chunk / 8)).zip(&scales) {
        unpack_signs(&bits[..to.len().div_ceil(8)], scale, to);
    }
    Ok(state.wire_bytes())
}

/// Adds the mean of what the ranks have said about this rank's chunk to `error`.
fn serve(bits: &[u8], scales: &[f32], error: &mut [f32]) {
    let (ranks, chunk) = (scales.len(), error.len());
    let mut unpacked = vec![vec![0.0; BLOCK]; ranks];
    let mut sum = [0.0; BLOCK];
    for (block, error) in error.chunks_mut(BLOCK).enumerate() {
        let size = error.len();
        let first = block * BLOCK / 8;
        for ((to, &scale), bits) in unpacked.iter_mut().zip(scales).zip(bits.chunks_exact(chunk / 8)) {
            unpack_signs(&bits[first..first + size / 8], scale, &mut to[..size]);
        }
        let parts: Vec<&[f32]> = unpacked.iter().map(|part| &part[..size]).collect();
        tree_sum(&parts, &mut sum[..size]);
        for (error, sum) in error.iter_mut().zip(&sum) {
            *error += sum / ranks as f32;
        }
    }
}

/// The root mean square and the signs of `values`, which become what those two leave out.
fn compress(values: &mut [f32]) -> (f32, Vec<u8>) {
    let scale = root_mean_square(values);
    let mut bits = vec![0; values.len().div_ceil(8)];
    pack_signs(values, &mut bits);
    for value in values {
        *value -= if *value >= 0.0 { scale } else { -scale };
    }
    (scale, bits)
}

/// Squares are summed in f64 in eight lanes, number `i` in lane `i % 8`, and the lanes from first to last: a fixed order that
/// vectorises.
fn root_mean_square(values: &[f32]) -> f32 {
    let mut lanes = [0.0_f64; 8];
    for eight in values.chunks(8) {
        for (lane, &value) in lanes.iter_mut().zip(eight) {
            *lane += f64::from(value) * f64::from(value);
        }
    }
    (lanes.iter().sum::<f64>() / values.len() as f64).sqrt() as f32
}
