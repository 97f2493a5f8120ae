//! AdamW over this rank's slices.

use tandem_kernels::optimizer::{AdamWConfig, adamw_slice};

use super::update::Update;
use crate::Result;
use crate::parallel::SliceBuffer;

pub(super) fn step(update: &Update<'_>, first: &mut [SliceBuffer], second: &mut [SliceBuffer]) -> Result<()> {
    let config = update.config;
    let adamw = AdamWConfig { beta1: config.beta1, beta2: config.beta2, eps: config.eps };
    for (index, (first, second)) in first.iter_mut().zip(second).enumerate() {
        update.grads.with_slice(index, |grad| {
            update.change(index, |weights| {
                for (own, weight_decay) in update.ranges(index) {
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
                }
                Ok::<(), crate::Error>(())
            })
        })???;
    }
    Ok(())
}
