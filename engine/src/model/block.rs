//! The transformer block of every family: attention branch, MLP branch, forward, backward and decode.
//!
//! Pre-norm (all but OPT-350m): `h = x + attention(norm1(x))`, `y = h + mlp(norm2(h))`.
//! Post-norm: `h = norm1(x + attention(x))`, `y = norm2(h + mlp(h))`.
//!
//! Training, reading a prompt and decoding share every line here but the attention itself, which the caller passes in.
//!
//! What a norm or an activation makes of something that is kept anyway is not kept for the backward but made again there: a
//! quarter of the memory for a hundredth of the time.

use candle_core::Tensor;
use tandem_kernels::attention::{AttentionSaved, AttentionSpec, attention, attention_backward};
use tandem_kernels::norm::NormStats;
use tandem_kernels::reduce::add_in_place;
use tandem_kernels::rope::rope_qkv;
use tandem_kernels::slice::to_f32;
use tandem_kernels::{dropout, gemm, mlp};

use super::linear::{
    Map, add_norm, input_backward, linear, linear_backward, linear_backward_f32, linear_f32, norm, norm_backward,
    rounded, weight_backward,
};
use super::lora::{Adapted, Low};
use super::pass::{Onward, Pass};
use super::pieces;
use super::spec::ModelSpec;
use super::unit::{
    DOWN, DOWN_BIAS, NORM1, NORM1_BIAS, NORM2, NORM2_BIAS, OUTPUT, OUTPUT_BIAS, QKV, QKV_BIAS, UP, UP_BIAS, UnitBuffer,
};
use crate::Result;

/// Whether a forward keeps what its backward can make again at little cost.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Keep {
    /// It does not: the backward comes after those of many other blocks.
    Least,
    /// It does: the backward comes next.
    All,
}

/// What a block's backward needs of its forward.
pub(super) struct BlockSaved<S = AttentionSaved> {
    attention: BranchSaved,
    attended: Vec<(Attended, S)>,
    attention_low: BranchLow,
    mlp: BranchSaved,
    activated: Vec<Activated>,
    mlp_low: BranchLow,
}

/// Values of one piece of the attention branch.
struct Attended {
    qkv: Tensor,
    attended: Tensor,
}

/// Values of one piece of the MLP branch.
struct Activated {
    up: Tensor,
    /// `None`: to be made again from `up`.
    activated: Option<Tensor>,
}

/// What the adapters of a branch's two linear maps have read.
struct BranchLow {
    first: Low,
    second: Low,
}

/// Around one branch: what went into its norm and its first linear map.
struct BranchSaved {
    /// Input of the norm.
    norm_input: Tensor,
    stats: NormStats,
    /// Input of the branch's first linear map; `None`: to be made again from that of the norm.
    input: Option<Tensor>,
}

/// The residual stream: as it stands, or before the output of a branch is added to it, which the next norm can do in its pass.
enum Stream {
    Whole(Tensor),
    Sum(Tensor, Tensor),
}

impl Stream {
    /// `[T, d]`.
    fn whole(self) -> Result<Tensor> {
        match self {
            Stream::Whole(x) => Ok(x),
            Stream::Sum(x, out) => {
                add_in_place(&out, &x)?;
                Ok(out)
            }
        }
    }
}

const QKV_MAP: Map = Map { weight: QKV, bias: Some(QKV_BIAS) };
const OUTPUT_MAP: Map = Map { weight: OUTPUT, bias: Some(OUTPUT_BIAS) };
const UP_MAP: Map = Map { weight: UP, bias: Some(UP_BIAS) };
const DOWN_MAP: Map = Map { weight: DOWN, bias: Some(DOWN_BIAS) };

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
    pub(super) adapted: Adapted<'a>,
}

impl Block<'_> {
    /// `y [T, d]` for `x [T, d]`, keeping what [`Block::backward`] needs.
    pub(super) fn forward(&self, x: &Tensor, pass: &Pass<'_>, keep: Keep) -> Result<(Tensor, BlockSaved)> {
        self.run(x, pass, keep, |place, qkv| Ok(attention(qkv, pass.cu_seqlens, &pass.attention[place])?))
    }

    /// `y [T, d]` for `x [T, d]`, keeping nothing; `attend` computes the attention of the rotated `qkv` of the piece at a
    /// place among those held.
    pub(super) fn infer(
        &self,
        x: &Tensor,
        pass: &Pass<'_>,
        attend: impl Fn(usize, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        Ok(self.run(x, pass, Keep::Least, |place, qkv| Ok((attend(place, qkv)?, ())))?.0)
    }

    /// The forward; `attend` returns something for the backward beside the attention's output.
    fn run<S>(
        &self,
        x: &Tensor,
        pass: &Pass<'_>,
        keep: Keep,
        attend: impl Fn(usize, &Tensor) -> Result<(Tensor, S)>,
    ) -> Result<(Tensor, BlockSaved<S>)> {
        let (stream, onward) = (Stream::Whole(x.clone()), self.onward(pass));
        let (stream, attention, (attended, attention_low)) =
            self.branch(stream, (NORM1, NORM1_BIAS), keep, onward, |input| {
                let (mut saved, mut outputs, mut inputs) = (Vec::new(), Vec::new(), Vec::new());
                let first = self.adapted.read(QKV, input, pass)?;
                for (place, piece) in self.pieces() {
                    let qkv = linear(self.weights, piece, QKV_MAP, input)?;
                    self.adapted.write(QKV, piece, &first, &qkv)?;
                    let AttentionSpec { heads, kv_heads, .. } = pass.attention[place];
                    if let Some(table) = pass.rope {
                        rope_qkv(&qkv, heads, kv_heads, table, pass.positions, false)?;
                    }
                    let (attended, softmax) = attend(place, &qkv)?;
                    let input = taken(onward, &attended)?;
                    outputs.push(linear_f32(self.weights, piece, self.inward(OUTPUT_MAP), &input)?);
                    saved.push((Attended { qkv, attended }, softmax));
                    inputs.push((piece, input));
                }
                let pass = past(onward, pass);
                let out = self.join(outputs, pass, OUTPUT_MAP)?;
                let inputs: Vec<_> = inputs.iter().map(|(piece, input)| (*piece, input)).collect();
                let second = self.adapted.gather(OUTPUT, &inputs, pass)?;
                self.adapted.spread(OUTPUT, &second, &out)?;
                Ok((self.dropout(&out, pass, Site::Attention)?, (saved, BranchLow { first, second })))
            })?;
        let pass = past(onward, pass);
        let (stream, mlp, (activated, mlp_low)) = self.branch(stream, (NORM2, NORM2_BIAS), keep, None, |input| {
            let (mut saved, mut outputs, mut inputs) = (Vec::new(), Vec::new(), Vec::new());
            let first = self.adapted.read(UP, input, pass)?;
            for piece in self.numbers() {
                let up = linear(self.weights, piece, UP_MAP, input)?;
                self.adapted.write(UP, piece, &first, &up)?;
                let activated = self.activate(&up)?;
                outputs.push(linear_f32(self.weights, piece, self.inward(DOWN_MAP), &activated)?);
                saved.push(Activated { up, activated: (keep == Keep::All).then(|| activated.clone()) });
                inputs.push((piece, activated));
            }
            let out = self.join(outputs, pass, DOWN_MAP)?;
            let inputs: Vec<_> = inputs.iter().map(|(piece, activated)| (*piece, activated)).collect();
            let second = self.adapted.gather(DOWN, &inputs, pass)?;
            self.adapted.spread(DOWN, &second, &out)?;
            Ok((self.dropout(&out, pass, Site::Mlp)?, (saved, BranchLow { first, second })))
        })?;
        Ok((stream.whole()?, BlockSaved { attention, attended, attention_low, mlp, activated, mlp_low }))
    }

    /// The rows that go on past this block's attention, if not all do.
    fn onward<'a>(&self, pass: &'a Pass<'a>) -> Option<&'a Onward<'a>> {
        pass.onward.as_deref().filter(|_| self.index + 1 == self.spec.layers)
    }

    /// What the MLP makes of the output of its first map.
    fn activate(&self, up: &Tensor) -> Result<Tensor> {
        let act = self.spec.activation;
        Ok(if self.spec.gated { mlp::gated(up, act)? } else { mlp::activation(up, act)? })
    }

    /// Numbers of the pieces held.
    fn numbers(&self) -> std::ops::Range<usize> {
        self.weights.layout().cut.held.clone()
    }

    /// Places and numbers of the pieces held.
    fn pieces(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        self.numbers().enumerate()
    }

    /// A map into the residual stream: in several pieces its bias waits until they are added up.
    fn inward(&self, map: Map) -> Map {
        if self.weights.layout().cut.pieces == 1 { map } else { Map { bias: None, ..map } }
    }

    /// Adds up what pieces put into the residual stream.
    fn join(&self, outputs: Vec<Tensor>, pass: &Pass<'_>, map: Map) -> Result<Tensor> {
        let out = pieces::sum(outputs, pass.tensor, map.weight)?;
        match map.bias.map(|bias| self.weights.find(bias)).transpose()?.flatten() {
            Some(bias) if self.weights.layout().cut.pieces > 1 => Ok(out.broadcast_add(&to_f32(&bias)?)?),
            _ => Ok(out),
        }
    }

    /// Backward of the bias of [`Block::join`].
    fn join_backward(&self, dy: &Tensor, grads: Option<&UnitBuffer>, map: Map) -> Result<()> {
        let bias = grads.and_then(|grads| map.bias.map(|bias| grads.find(bias)));
        match bias.transpose()?.flatten() {
            Some(bias) if self.weights.layout().cut.pieces > 1 => Ok(gemm::bias_grad(dy, &bias)?),
            _ => Ok(()),
        }
    }

    /// A residual branch around `compute`, with its norm before or after as the spec says. The output of `compute` has the rows
    /// of `onward`, if these are not all.
    ///
    /// `compute` also returns what its own backward needs.
    fn branch<S>(
        &self,
        stream: Stream,
        (weight, bias): (&str, &str),
        keep: Keep,
        onward: Option<&Onward<'_>>,
        compute: impl FnOnce(&Tensor) -> Result<(Tensor, S)>,
    ) -> Result<(Stream, BranchSaved, S)> {
        let add_norm = |x: &Tensor, out: &Tensor| add_norm(self.spec, self.weights, weight, bias, x, out);
        if self.spec.post_norm {
            let x = stream.whole()?;
            let input = rounded(self.weights, &x)?;
            let (out, inner) = compute(&input)?;
            let (norm_input, y, stats) = add_norm(&taken(onward, &x)?, &out)?;
            Ok((Stream::Whole(y), BranchSaved { norm_input, stats, input: Some(input) }, inner))
        } else {
            let (x, input, stats) = match stream {
                Stream::Whole(x) => {
                    let (input, stats) = norm(self.spec, self.weights, weight, bias, &x)?;
                    (x, input, stats)
                }
                Stream::Sum(x, out) => add_norm(&x, &out)?,
            };
            let (out, inner) = compute(&input)?;
            let input = (keep == Keep::All).then_some(input);
            Ok((Stream::Sum(taken(onward, &x)?, out), BranchSaved { norm_input: x, stats, input }, inner))
        }
    }

    /// Gradient of the block's input from that of its output; the gradients of what is trained, the weights or the adapters,
    /// are added to `trained`.
    pub(super) fn backward(
        &self,
        saved: BlockSaved,
        dy: &Tensor,
        pass: &Pass<'_>,
        trained: &UnitBuffer,
    ) -> Result<Tensor> {
        let (spec, adapted) = (self.spec, &self.adapted);
        let grads = adapted.adapters.is_none().then_some(trained);
        let BlockSaved { attention, attended, attention_low, mlp, activated, mlp_low } = saved;
        let onward = self.onward(pass);
        let (whole, pass) = (pass, past(onward, pass));
        let dh = self.branch_backward(&mlp, dy, grads, (NORM2, NORM2_BIAS), None, |dy, input| {
            let dy = self.dropout(dy, pass, Site::Mlp)?;
            self.join_backward(&dy, grads, DOWN_MAP)?;
            let dy = rounded(self.weights, &dy)?;
            let low = adapted.spread_backward(DOWN, &mlp_low.second, &dy, trained)?;
            let (mut inputs, mut rising) = (Vec::new(), Vec::new());
            for (piece, Activated { up, activated }) in self.numbers().zip(&activated) {
                let map = self.inward(DOWN_MAP);
                let d_activated = input_backward(self.weights, piece, map, &dy)?;
                let (d_up, activated) = match activated {
                    None if spec.gated && adapted.adapters.is_none() => {
                        mlp::gated_backward_again(&d_activated, up, spec.activation)?
                    }
                    _ => {
                        let activated = activated.clone().map_or_else(|| self.activate(up), Ok)?;
                        adapted.gather_backward(DOWN, piece, &low, &activated, &d_activated, pass, trained)?;
                        let backward = if spec.gated { mlp::gated_backward } else { mlp::activation_backward };
                        (backward(&d_activated, up, spec.activation)?, activated)
                    }
                };
                weight_backward(grads, piece, map, &activated, &dy)?;
                inputs.push(linear_backward_f32(self.weights, grads, piece, UP_MAP, input, &d_up)?);
                adapted.write_backward(UP, piece, &mlp_low.first, &d_up, trained, &mut rising)?;
            }
            let dx = pieces::sum(inputs, pass.tensor, "gradient of the mlp's input")?;
            adapted.read_backward(UP, rising, input, &dx, pass, trained)?;
            Ok(dx)
        })?;
        drop((mlp, activated));
        self.branch_backward(&attention, &dh, grads, (NORM1, NORM1_BIAS), onward, |dy, input| {
            let dy = self.dropout(dy, pass, Site::Attention)?;
            self.join_backward(&dy, grads, OUTPUT_MAP)?;
            let dy = rounded(self.weights, &dy)?;
            let low = adapted.spread_backward(OUTPUT, &attention_low.second, &dy, trained)?;
            let (mut inputs, mut rising) = (Vec::new(), Vec::new());
            for ((place, piece), (Attended { qkv, attended }, softmax)) in self.pieces().zip(&attended) {
                let map = self.inward(OUTPUT_MAP);
                let output_input = taken(onward, attended)?;
                let d_attended = linear_backward(self.weights, grads, piece, map, &output_input, &dy)?;
                adapted.gather_backward(OUTPUT, piece, &low, &output_input, &d_attended, pass, trained)?;
                let d_attended = spread(onward, &d_attended)?;
                let spec = &whole.attention[place];
                let dqkv = attention_backward(&d_attended, qkv, attended, softmax, whole.cu_seqlens, spec)?;
                if let Some(table) = whole.rope {
                    rope_qkv(&dqkv, spec.heads, spec.kv_heads, table, whole.positions, true)?;
                }
                inputs.push(linear_backward_f32(self.weights, grads, piece, QKV_MAP, input, &dqkv)?);
                adapted.write_backward(QKV, piece, &attention_low.first, &dqkv, trained, &mut rising)?;
            }
            let dx = pieces::sum(inputs, pass.tensor, "gradient of the attention's input")?;
            adapted.read_backward(QKV, rising, input, &dx, whole, trained)?;
            Ok(dx)
        })
    }

    /// Backward of [`Block::branch`]; `compute` maps the gradient of the branch's output, and its input, to the gradient of its
    /// input.
    fn branch_backward(
        &self,
        saved: &BranchSaved,
        dy: &Tensor,
        grads: Option<&UnitBuffer>,
        (weight, bias): (&str, &str),
        onward: Option<&Onward<'_>>,
        compute: impl FnOnce(&Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let input = match &saved.input {
            Some(input) => input.clone(),
            None => norm(self.spec, self.weights, weight, bias, &saved.norm_input)?.0,
        };
        let through_norm = |dy: &Tensor, past: Option<&Tensor>| {
            norm_backward(self.spec, self.weights, grads, weight, bias, &saved.norm_input, &saved.stats, dy, past)
        };
        if self.spec.post_norm {
            let d_sum = through_norm(dy, None)?;
            let dx = compute(&d_sum, &input)?;
            add_in_place(&dx, &spread(onward, &d_sum)?)?;
            Ok(dx)
        } else {
            through_norm(&compute(dy, &input)?, Some(&spread(onward, dy)?))
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

/// The rows of `x` that go on.
fn taken(onward: Option<&Onward<'_>>, x: &Tensor) -> Result<Tensor> {
    onward.map_or_else(|| Ok(x.clone()), |onward| onward.take(x))
}

/// The backward of [`taken`].
fn spread(onward: Option<&Onward<'_>>, dx: &Tensor) -> Result<Tensor> {
    onward.map_or_else(|| Ok(dx.clone()), |onward| onward.spread(dx))
}

/// What is told to the part of a block that computes only the rows that go on.
fn past<'a>(onward: Option<&'a Onward<'a>>, pass: &'a Pass<'a>) -> &'a Pass<'a> {
    onward.map_or(pass, |onward| &onward.pass)
}
