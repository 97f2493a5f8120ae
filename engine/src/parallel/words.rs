//! Numbers in bf16 on their way between ranks: two in each 32-bit word, for gathers move words and never look into them.

use half::bf16;
use tandem_collective::Work;
use tandem_kernels::slice::narrow_slice;

use crate::Result;

/// `values`, an even number of them, in bf16: two in each word.
pub(super) fn narrowed(values: &[f32]) -> Result<Vec<f32>> {
    let mut words = vec![0f32; values.len() / 2];
    narrow_slice(values, halves_mut(&mut words))?;
    Ok(words)
}

/// The numbers in words.
pub(super) fn halves(words: &[f32]) -> &[bf16] {
    // SAFETY: every pattern of bits is a bf16, and an f32 has room for two and the stricter alignment.
    unsafe { words.align_to::<bf16>() }.1
}

/// As [`halves`], to be written.
pub(super) fn halves_mut(words: &mut [f32]) -> &mut [bf16] {
    // SAFETY: as in `halves`, and every pattern of bits is an f32.
    unsafe { words.align_to_mut::<bf16>() }.1
}

/// Waits for a gather of words and writes the numbers in them.
pub(super) fn wait_into(work: Work, all: &mut [bf16]) -> Result<()> {
    // SAFETY: every pattern of bits is an f32.
    let (before, words, after) = unsafe { all.align_to_mut::<f32>() };
    if before.is_empty() && after.is_empty() {
        return Ok(work.wait_into(words)?);
    }
    let mut words = vec![0f32; all.len() / 2];
    work.wait_into(&mut words)?;
    all.copy_from_slice(halves(&words));
    Ok(())
}
