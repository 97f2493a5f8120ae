//! 1-bit Adam (Tang et al., ICML 2021; DeepSpeed's `OnebitAdam`).
//!
//! ```text
//! until the freeze    g = mean over the ranks;  m ← β₁ m + (1 − β₁) g;  v ← β₂ v + (1 − β₂) g²
//! afterwards          m ← mean of signs over the ranks of (β₁ m + (1 − β₁) g of the rank);  m ← 0 where v = 0
//! always              p ← p − lr (m / (√v + eps) + weight_decay · p)
//! ```

use super::exchange::Exchange;
use super::zero_where_no_variance;
use crate::Result;
use crate::parallel::SliceBuffer;
use crate::train::update::Update;

pub(super) fn step(
    update: &Update<'_>,
    exchange: &mut Exchange,
    freeze_steps: u64,
    first: &mut [SliceBuffer],
    second: &mut [SliceBuffer],
) -> Result<()> {
    for (unit, (m, v)) in first.iter_mut().zip(second).enumerate() {
        update.momentum(unit, m)?;
        if update.step <= freeze_steps {
            update.variance(unit, v)?;
        } else {
            exchange.mean(unit, "signs of momenta", m)?;
            zero_where_no_variance(m, v);
        }
        update.adam(unit, m, v)?;
        m.let_go();
        v.let_go();
    }
    Ok(())
}
