//! Which kernels an element type takes: f32 the register tiles, bf16 the matrix tiles where there are any.

use half::bf16;

use super::backward::{self, Inputs};
use super::blocks::Block;
use super::decode::{Span, Step};
use super::layout::Stored;
use super::{AttentionSpec, decode, forward};
use crate::gemm::Output;

/// The kernels of an element type; see [`super::attention`], [`super::attention_backward`], [`super::decode_attention`].
pub(super) trait Kernels: Stored {
    fn forward(qkv: &[Self], blocks: &[Block], spec: &AttentionSpec, o: Output<'_, Self>, lse: Output<'_, f32>) {
        forward::forward(qkv, blocks, spec, o, lse);
    }

    fn backward(inputs: Inputs<Self>, blocks: &[Block], spec: &AttentionSpec, dqkv: Output<'_, Self>) {
        backward::backward(inputs, blocks, spec, dqkv);
    }

    fn decode(step: &Step<'_, Self>, spans: &[Span], o: &mut [Self]) {
        decode::decode(step, spans, o);
    }
}

impl Kernels for f32 {}

#[cfg(not(target_arch = "x86_64"))]
impl Kernels for bf16 {}

#[cfg(target_arch = "x86_64")]
impl Kernels for bf16 {
    fn forward(qkv: &[bf16], blocks: &[Block], spec: &AttentionSpec, o: Output<'_, bf16>, lse: Output<'_, f32>) {
        if tiles() {
            super::amx::forward(qkv, blocks, spec, o, lse);
        } else {
            forward::forward(qkv, blocks, spec, o, lse);
        }
    }

    fn backward(inputs: Inputs<bf16>, blocks: &[Block], spec: &AttentionSpec, dqkv: Output<'_, bf16>) {
        if tiles() {
            super::amx::backward(inputs, blocks, spec, dqkv);
        } else {
            backward::backward(inputs, blocks, spec, dqkv);
        }
    }

    fn decode(step: &Step<'_, bf16>, spans: &[Span], o: &mut [bf16]) {
        if tiles() {
            super::amx::decode(step, spans, o);
        } else {
            decode::decode(step, spans, o);
        }
    }
}

/// Whether bf16 goes by matrix tiles.
#[cfg(target_arch = "x86_64")]
fn tiles() -> bool {
    crate::Isa::active() == crate::Isa::Amx
}
