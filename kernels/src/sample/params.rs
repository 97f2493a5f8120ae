//! What a user can ask of the sampler.

use crate::{Error, Result};

/// How tokens are chosen. The default is to sample from the model's own distribution.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 takes the most probable token.
    pub temperature: f32,
    /// Keeps the `top_k` most probable tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the fewest most probable tokens whose probabilities reach `top_p`; 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens at least `min_p` times as probable as the most probable one; 0 keeps all.
    pub min_p: f32,
    /// Divides the positive and multiplies the negative logits of tokens already present; 1 changes nothing.
    pub repetition_penalty: f32,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0 }
    }
}

impl SamplingParams {
    /// The most probable token, always.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Whether the most probable token is taken.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// Whether tokens are drawn from the model's own distribution, unchanged.
    pub fn is_plain(&self) -> bool {
        self.temperature == 1.0 && self.repetition_penalty == 1.0 && !self.truncates()
    }

    /// Whether some tokens may be excluded.
    pub(super) fn truncates(&self) -> bool {
        self.top_k > 0 || self.top_p < 1.0 || self.min_p > 0.0
    }

    /// An error that names the field if one is outside its range.
    pub fn validate(&self) -> Result<()> {
        let check = |what, value: f32, ok: bool, expected| {
            if ok { Ok(()) } else { Err(Error::Value { op: "sampling", what, expected, got: f64::from(value) }) }
        };
        let Self { temperature, top_p, min_p, repetition_penalty, top_k: _ } = *self;
        check("temperature", temperature, temperature >= 0.0 && temperature.is_finite(), "finite and at least 0")?;
        check("top_p", top_p, top_p > 0.0 && top_p <= 1.0, "in (0, 1]")?;
        check("min_p", min_p, (0.0..=1.0).contains(&min_p), "in [0, 1]")?;
        check(
            "repetition_penalty",
            repetition_penalty,
            repetition_penalty > 0.0 && repetition_penalty.is_finite(),
            "finite and above 0",
        )
    }
}
