//! The transformer block of every family: attention branch, MLP branch, forward, backward and decode.
//!
//! Pre-norm (all but OPT-350m): `h = x + attention(norm1(x))`, `y = h + mlp(norm2(h))`.
//! Post-norm: `h = norm1(x + attention(x))`, `y = norm2(h + mlp(h))`.
//!
//! Training, reading a prompt and decoding share every line here but the attention itself, which the caller passes in.

use candle_core::Tensor;
use tandem_kernels::attention::{AttentionSaved, attention, attention_backward};
use tandem_kernels::norm::NormStats;
use tandem_kernels::rope::rope_qkv;
use tandem_kernels::{dropout, mlp};

use super::linear::{linear, linear_backward, norm, norm_backward};
use super::pass::Pass;
use super::spec::ModelSpec;
use super::unit::{
    DOWN, DOWN_BIAS, NORM1, NORM1_BIAS, NORM2, NORM2_BIAS, OUTPUT, OUTPUT_BIAS, QKV, QKV_BIAS, UP, UP_BIAS, UnitBuffer,
};
use crate::Result;

/// What a block's backward needs of its forward.
pub(super) struct BlockSaved {
    attention: BranchSaved,
    qkv: Tensor,
    attended: Tensor,
    softmax: AttentionSaved,
    mlp: BranchSaved,
    up: Tensor,
    activated: Tensor,
}

/// Around one branch: what went into its norm and its first linear map.
struct BranchSaved {
    /// Input of the norm.
    norm_input: Tensor,
    stats: NormStats,
    /// Input of the branch's first linear map.
    input: Tensor,
}

/// Places of dropout inside a block; each has its own masks.
#[derive(Clone, Copy)]
enum Site {
    Attention = 0,
    Mlp = 1,
}

/// One block: its place and its weights.
pub(super) struct Block<'a> {
    pub(super) spec: &'a ModelSpec,
    pub(super) index: usize,
    pub(super) weights: &'a UnitBuffer,
}

/// Intermediate values of [`Block::run`].
struct Run {
    y: Tensor,
    attention: BranchSaved,
    qkv: Tensor,
    attended: Tensor,
    mlp: BranchSaved,
    up: Tensor,
    activated: Tensor,
}

impl Block<'_> {
    /// `y [T, d]` for `x [T, d]`, keeping what [`Block::backward`] needs.
    pub(super) fn forward(&self, x: &Tensor, pass: &Pass<'_>) -> Result<(Tensor, BlockSaved)> {
        let (run, softmax) = self.run(x, pass, |qkv| Ok(attention(qkv, pass.cu_seqlens, pass.attention)?))?;
        let Run { y, attention, qkv, attended, mlp, up, activated } = run;
        Ok((y, BlockSaved { attention, qkv, attended, softmax, mlp, up, activated }))
    }

    /// `y [T, d]` for `x [T, d]`, keeping nothing; `attend` computes the attention of the rotated `qkv`.
    pub(super) fn infer(
        &self,
        x: &Tensor,
        pass: &Pass<'_>,
        attend: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        Ok(self.run(x, pass, |qkv| Ok((attend(qkv)?, ())))?.0.y)
    }

    /// The forward; `attend` may return something of its own beside the attention's output.
    fn run<S>(
        &self,
        x: &Tensor,
        pass: &Pass<'_>,
        attend: impl FnOnce(&Tensor) -> Result<(Tensor, S)>,
    ) -> Result<(Run, S)> {
        let spec = self.spec;
        let attention_norm = |x: &Tensor| norm(spec, self.weights, NORM1, NORM1_BIAS, x);
        let mlp_norm = |x: &Tensor| norm(spec, self.weights, NORM2, NORM2_BIAS, x);

        let (h, attention, (qkv, attended, attend_saved)) = self.branch(x, attention_norm, |input| {
            let qkv = linear(self.weights, QKV, QKV_BIAS, input)?;
            if let Some(table) = pass.rope {
                rope_qkv(&qkv, spec.heads, spec.kv_heads, table, pass.positions, false)?;
            }
            let (attended, attend_saved) = attend(&qkv)?;
            let out = linear(self.weights, OUTPUT, OUTPUT_BIAS, &attended)?;
            Ok((self.dropout(&out, pass, Site::Attention)?, (qkv, attended, attend_saved)))
        })?;
        let (y, mlp, (up, activated)) = self.branch(&h, mlp_norm, |input| {
            let up = linear(self.weights, UP, UP_BIAS, input)?;
            let activated =
                if spec.gated { mlp::gated(&up, spec.activation)? } else { mlp::activation(&up, spec.activation)? };
            let out = linear(self.weights, DOWN, DOWN_BIAS, &activated)?;
            Ok((self.dropout(&out, pass, Site::Mlp)?, (up, activated)))
        })?;
        Ok((Run { y, attention, qkv, attended, mlp, up, activated }, attend_saved))
    }

    /// A residual branch around `compute`, with its norm before or after as the spec says.
    ///
    /// `compute` also returns what its own backward needs.
    fn branch<S>(
        &self,
        x: &Tensor,
        norm: impl Fn(&Tensor) -> Result<(Tensor, NormStats)>,
        compute: impl FnOnce(&Tensor) -> Result<(Tensor, S)>,
    ) -> Result<(Tensor, BranchSaved, S)> {
        if self.spec.post_norm {
            let (out, inner) = compute(x)?;
            let sum = (x + out)?;
            let (y, stats) = norm(&sum)?;
            Ok((y, BranchSaved { norm_input: sum, stats, input: x.clone() }, inner))
        } else {
            let (input, stats) = norm(x)?;
            let (out, inner) = compute(&input)?;
            Ok(((x + out)?, BranchSaved { norm_input: x.clone(), stats, input }, inner))
        }
    }

    /// Gradient of the block's input from that of its output; parameter gradients are added to `grads`.
    pub(super) fn backward(
        &self,
        saved: BlockSaved,
        dy: &Tensor,
        pass: &Pass<'_>,
        grads: &UnitBuffer,
    ) -> Result<Tensor> {
        let spec = self.spec;
        let BlockSaved { attention, qkv, attended, softmax, mlp, up, activated } = saved;
        let dh = self.branch_backward(&mlp, dy, grads, (NORM2, NORM2_BIAS), |dy| {
            let dy = self.dropout(dy, pass, Site::Mlp)?;
            let d_activated = linear_backward(self.weights, grads, DOWN, DOWN_BIAS, &activated, &dy)?;
            let d_up = if spec.gated {
                mlp::gated_backward(&d_activated, &up, spec.activation)?
            } else {
                mlp::activation_backward(&d_activated, &up, spec.activation)?
            };
            linear_backward(self.weights, grads, UP, UP_BIAS, &mlp.input, &d_up)
        })?;
        self.branch_backward(&attention, &dh, grads, (NORM1, NORM1_BIAS), |dy| {
            let dy = self.dropout(dy, pass, Site::Attention)?;
            let d_attended = linear_backward(self.weights, grads, OUTPUT, OUTPUT_BIAS, &attended, &dy)?;
            let dqkv = attention_backward(&d_attended, &qkv, &attended, &softmax, pass.cu_seqlens, pass.attention)?;
            if let Some(table) = pass.rope {
                rope_qkv(&dqkv, spec.heads, spec.kv_heads, table, pass.positions, true)?;
            }
            linear_backward(self.weights, grads, QKV, QKV_BIAS, &attention.input, &dqkv)
        })
    }

    /// Backward of [`Block::branch`]; `compute` maps the gradient of the branch's output to that of its input.
    fn branch_backward(
        &self,
        saved: &BranchSaved,
        dy: &Tensor,
        grads: &UnitBuffer,
        (weight, bias): (&str, &str),
        compute: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let through_norm = |dy: &Tensor| {
            norm_backward(self.spec, self.weights, grads, weight, bias, &saved.norm_input, &saved.stats, dy)
        };
        if self.spec.post_norm {
            let d_sum = through_norm(dy)?;
            Ok((&d_sum + compute(&d_sum)?)?)
        } else {
            Ok((dy + through_norm(&compute(dy)?)?)?)
        }
    }

    /// Dropout in the forward, and, being linear with an addressed mask, in the backward as well.
    fn dropout(&self, x: &Tensor, pass: &Pass<'_>, site: Site) -> Result<Tensor> {
        match &pass.dropout {
            None => Ok(x.clone()),
            Some(drop) => {
                let site = 1 + 2 * self.index as u16 + site as u16;
                Ok(dropout::dropout(x, drop.probability, &drop.stream, site, &drop.addresses)?)
            }
        }
    }
}
