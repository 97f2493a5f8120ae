//! AdamW over this rank's slices.

use std::ops::Range;

use tandem_kernels::optimizer::{AdamWConfig, adamw_slice};

use super::update::Update;
use crate::Result;
use crate::parallel::SliceBuffer;

/// Elements of either moment that are updated before what lies in files is let go of.
pub const MOMENTS_AT_ONCE: usize = 1 << 20;

pub(super) fn step(update: &Update<'_>, first: &mut [SliceBuffer], second: &mut [SliceBuffer]) -> Result<()> {
    let config = update.config;
    let adamw = AdamWConfig { beta1: config.beta1, beta2: config.beta2, eps: config.eps };
    for (index, (first, second)) in first.iter_mut().zip(second).enumerate() {
        update.grads.with_slice(index, |grad| {
            update.change(index, |weights| {
                let ranges = update.ranges(index).into_iter();
                for (own, weight_decay) in ranges.flat_map(|(range, decay)| parts(range).map(move |part| (part, decay)))
                {
                    adamw_slice(
                        &mut weights[own.clone()],
                        &grad[own.clone()],
                        &mut first[own.clone()],
                        &mut second[own],
                        update.lr,
                        weight_decay,
                        update.step,
                        update.scale,
                        &adamw,
                    )?;
                    first.let_go();
                    second.let_go();
                }
                Ok::<(), crate::Error>(())
            })
        })???;
    }
    Ok(())
}

/// A range, in parts.
fn parts(range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(MOMENTS_AT_ONCE).map(move |start| start..end.min(start + MOMENTS_AT_ONCE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_a_range() {
        for range in [0..0, 3..4, 5..MOMENTS_AT_ONCE + 5, 7..3 * MOMENTS_AT_ONCE] {
            let parts: Vec<_> = parts(range.clone()).collect();
            assert!(parts.iter().all(|part| (1..=MOMENTS_AT_ONCE).contains(&part.len())));
            assert!(parts.into_iter().flatten().eq(range));
        }
    }
}
