//! A vote of the ranks on every sign.

use super::signs::{pack_signs, unpack_signs};
use crate::collective::Collective;
use crate::error::Result;
use crate::tag::Tag;

/// Replaces each of `values` on every rank by `+1.0` or `-1.0`, whichever sign most ranks gave it. Source: Bernstein et al.,
/// "signSGD with majority vote", 2019.
///
/// Zeros vote `+`, NaN votes `-`, and a tie is `+`: one bit has no zero. Returns the bytes sent to peers (as many are
/// received): about `values.len() / 4`.
///
/// # Errors
/// As any call of [`Collective`].
pub fn sign_majority(world: &dyn Collective, tag: Tag, values: &mut [f32]) -> Result<u64> {
    let ranks = world.world();
    // Each rank counts the votes on one chunk, of whole bytes.
    let chunk_bytes = values.len().div_ceil(8 * ranks);
    let mut votes = vec![0; chunk_bytes * ranks];
    pack_signs(values, &mut votes[..values.len().div_ceil(8)]);
    let mut received = vec![0; votes.len()];
    world.all_to_all(tag, &votes, &mut received)?;

    let mut elected = vec![0; chunk_bytes];
    for (at, byte) in elected.iter_mut().enumerate() {
        let mut counts = [0_usize; 8];
        for rank in 0..ranks {
            let vote = received[rank * chunk_bytes + at];
            for (i, count) in counts.iter_mut().enumerate() {
                *count += usize::from(vote >> (7 - i) & 1);
            }
        }
        *byte = counts.iter().enumerate().fold(0, |byte, (i, &count)| byte | u8::from(2 * count >= ranks) << (7 - i));
    }
    world.all_gather(tag, &elected, &mut votes)?;
    unpack_signs(&votes[..values.len().div_ceil(8)], 1.0, values);
    Ok((2 * (ranks - 1) * chunk_bytes) as u64)
}
