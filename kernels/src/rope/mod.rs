//! Rotary position embedding, in place on the fused projection.
//!
//! Su et al. 2021 (*RoFormer*), eq. 34, in the half-split layout of GPT-NeoX and Llama: with `r` rotated coordinates per
//! head, coordinate `i < r/2` is paired with `i + r/2` and turned by the angle `position · theta^(-2i/r)`. Coordinates
//! from `r` on (GPT-NeoX's `rotary_pct`) stay. The backward is the inverse rotation. The elements are
//! f32 or bf16; angles and arithmetic are f32.

use candle_core::Tensor;

use crate::element::with_element;
use crate::profile::{Class, time};
use crate::view::{tensor, view, view_mut_of};
use crate::{Error, Result};

mod cpu;

/// How a model stretches its rotary frequencies beyond the context it was first trained on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// All frequencies divided by `factor` (Chen et al. 2023, position interpolation).
    Linear {
        /// By how much.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a linear blend between.
    Llama3 {
        /// By how much the lowest frequencies are divided.
        factor: f64,
        /// Frequencies with fewer turns than this within the original context are divided.
        low_freq_factor: f64,
        /// Frequencies with more turns than this within the original context are kept.
        high_freq_factor: f64,
        /// The original context, in tokens.
        original_max_positions: usize,
    },
}

impl RopeScaling {
    /// The frequency (radians per token) that replaces `frequency`.
    fn apply(&self, frequency: f64) -> f64 {
        match *self {
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
                let turns = original_max_positions as f64 * frequency / std::f64::consts::TAU;
                if turns < low_freq_factor {
                    frequency / factor
                } else if turns > high_freq_factor {
                    frequency
                } else {
                    let keep = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - keep) * frequency / factor + keep * frequency
                }
            }
        }
    }
}

/// Cosines and sines of every position.
#[derive(Clone, Debug)]
pub struct RopeTable {
    /// `[max_positions, rotary_dim / 2]`.
    cos: Tensor,
    /// `[max_positions, rotary_dim / 2]`.
    sin: Tensor,
}

impl RopeTable {
    /// Angles of `max_positions` positions for `rotary_dim` rotated coordinates per head (usually the head width).
    ///
    /// Computed in f64, stored in f32.
    ///
    /// # Errors
    /// If `rotary_dim` is odd or zero, or `theta` is not positive.
    pub fn new(rotary_dim: usize, max_positions: usize, theta: f64, scaling: Option<RopeScaling>) -> Result<Self> {
        const OP: &str = "rope table";
        if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) {
            return Err(Error::shape(OP, "rotary dimension", "even and positive", rotary_dim));
        }
        if !(theta.is_finite() && theta > 0.0) {
            return Err(Error::shape(OP, "theta", "finite and positive", theta));
        }
        let half = rotary_dim / 2;
        let frequencies: Vec<f64> = (0..half)
            .map(|i| theta.powf(-2.0 * i as f64 / rotary_dim as f64))
            .map(|frequency| scaling.map_or(frequency, |scaling| scaling.apply(frequency)))
            .collect();
        let (mut cos, mut sin) = (Vec::with_capacity(max_positions * half), Vec::with_capacity(max_positions * half));
        for position in 0..max_positions {
            for frequency in &frequencies {
                let (s, c) = (position as f64 * frequency).sin_cos();
                cos.push(c as f32);
                sin.push(s as f32);
            }
        }
        Ok(Self { cos: tensor(cos, (max_positions, half))?, sin: tensor(sin, (max_positions, half))? })
    }

    /// Positions that the table covers.
    pub fn max_positions(&self) -> usize {
        self.cos.dims()[0]
    }

    /// Rotated coordinates per head.
    pub fn rotary_dim(&self) -> usize {
        2 * self.cos.dims()[1]
    }
}

/// Rotates every head of `x [T, heads, D]` in place; `inverse` rotates back, which is the backward.
///
/// # Errors
/// [`Error::Index`] if a position lies beyond the table; else if a shape, dtype or device does not fit.
pub fn rope(x: &Tensor, table: &RopeTable, positions: &[u32], inverse: bool) -> Result<()> {
    const OP: &str = "rope";
    let &[rows, heads, head_dim] = x.dims() else {
        return Err(Error::shape(OP, "x", "[T, heads, D]", x.dims()));
    };
    rotate(OP, x, rows, heads * head_dim, heads, head_dim, table, positions, inverse)
}

/// Rotates the query and key heads of a fused projection `qkv [T, (H + 2K) D]` in place; the value heads stay.
///
/// `heads` is H and `kv_heads` is K; `inverse` rotates back, which is the backward.
///
/// # Errors
/// [`Error::Index`] if a position lies beyond the table; else if a shape, dtype or device does not fit.
pub fn rope_qkv(
    qkv: &Tensor,
    heads: usize,
    kv_heads: usize,
    table: &RopeTable,
    positions: &[u32],
    inverse: bool,
) -> Result<()> {
    let _timer = time(Class::Rows, 0);
    const OP: &str = "rope_qkv";
    let all_heads = heads + 2 * kv_heads;
    let &[rows, width] = qkv.dims() else {
        return Err(Error::shape(OP, "qkv", "[T, (H + 2K) D]", qkv.dims()));
    };
    if all_heads == 0 || !width.is_multiple_of(all_heads) {
        return Err(Error::shape(OP, "width of qkv", format!("a multiple of H + 2K = {all_heads}"), width));
    }
    rotate(OP, qkv, rows, width, heads + kv_heads, width / all_heads, table, positions, inverse)
}

/// Rotates the first `heads` heads of each row of `width` elements.
fn rotate(
    op: &'static str,
    x: &Tensor,
    rows: usize,
    width: usize,
    heads: usize,
    head_dim: usize,
    table: &RopeTable,
    positions: &[u32],
    inverse: bool,
) -> Result<()> {
    if positions.len() != rows {
        return Err(Error::shape(op, "number of positions", rows, positions.len()));
    }
    if table.rotary_dim() > head_dim {
        return Err(Error::shape(
            op,
            "rotary dimension of the table",
            format!("at most {head_dim}"),
            table.rotary_dim(),
        ));
    }
    let limit = table.max_positions();
    if let Some(&position) = positions.iter().find(|&&position| position as usize >= limit) {
        return Err(Error::Index { op, what: "position", index: position as usize, limit });
    }
    let (cos, sin) = (view(op, &table.cos)?, view(op, &table.sin)?);
    let half = table.rotary_dim() / 2;
    with_element!(op, x.dtype(), E => view_mut_of::<E, _>(op, x, |x| {
        cpu::rotate(x, width, heads, head_dim, half, &cos, &sin, positions, inverse);
    }))
}
