//! Adapters added to a copy of the weights: `W + s·B·A`.
//!
//! Each element is the same sum whoever computes it, so a merged and cut model equals a cut and merged one bit for bit.

use tandem_kernels::gemm;
use tandem_kernels::slice::{with_slice, with_slice_mut};

use super::Adapters;
use crate::Result;
use crate::model::spec::ModelSpec;
use crate::model::unit::{SCORE, UnitBuffer, UnitId};

impl Adapters {
    /// Adds the adapters of a unit to `weights`, in place: a buffer of the base's layout, cut as `unit` is.
    pub(crate) fn merge(&self, spec: &ModelSpec, weights: &UnitBuffer, unit: &UnitBuffer) -> Result<()> {
        if unit.layout().is_empty() {
            return Ok(());
        }
        if unit.layout().id == UnitId::Ends {
            let (score, target) = (unit.get(SCORE)?, weights.get(SCORE)?);
            with_slice(&score, |score| with_slice_mut(&target, |target| target.copy_from_slice(score)))??;
            return Ok(());
        }
        let cut = &unit.layout().cut;
        for site in &self.set.sites {
            for index in cut.held.clone() {
                let rows = site.rows(spec, &cut.piece(spec, index));
                if rows.is_empty() {
                    continue;
                }
                let target = weights.get_of(index, site.weight)?.narrow(0, rows.start, rows.len())?;
                let b = (unit.get_of(index, site.b)?.t()?.contiguous()? * self.config.scale())?;
                gemm::linear_weight_grad(&b, &unit.get_of(index, site.a)?, &target)?;
            }
        }
        Ok(())
    }
}
