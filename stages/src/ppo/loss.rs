//! The two losses of PPO as functions of log-probabilities and values; scalars over `[N]`, so candle differentiates them.

use candle_core::{D, Device, Tensor};
use tandem_engine::{LogProbs, Result};

/// Ratios are formed from log differences cut to ± this: e²⁰ is already beyond any sense, and finite.
const MAX_LOG_RATIO: f64 = 20.0;

/// Sums over the tokens of one micro-batch, to be divided by the mini-batch's token count.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PolicyStats {
    /// Response tokens.
    pub tokens: f64,
    /// Policy loss.
    pub loss: f64,
    /// Entropy of the policy, nats.
    pub entropy: f64,
    /// Tokens whose gradient was cut by the clip.
    pub clipped: f64,
    /// `r − 1 − log r`, an unbiased estimate of KL(old ‖ new) that is never negative (Schulman 2020, "k3").
    pub approx_kl: f64,
    /// Largest ratio of new to old probability.
    pub ratio_max: f64,
    /// Largest difference between a new and an old log-probability.
    pub logp_gap_max: f64,
}

/// Clipped surrogate (Schulman et al. 2017, equation 7) with an entropy bonus, summed over tokens:
/// `Σ max(−A r, −A clip(r, 1 ± ε)) − c Σ H`, `r = π / π_old`.
///
/// `old_logp` and `advantages` are `[N]`.
///
/// # Errors
/// If the tensor library refuses.
pub fn policy_loss(
    new: &LogProbs,
    old_logp: &Tensor,
    advantages: &Tensor,
    clip: f64,
    entropy_coefficient: f64,
) -> Result<Tensor> {
    let ratio = (&new.logp - old_logp)?.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)?.exp()?;
    let plain = (&ratio * advantages)?;
    let clipped = (ratio.clamp(1.0 - clip, 1.0 + clip)? * advantages)?;
    let surrogate = plain.minimum(&clipped)?.sum(D::Minus1)?.neg()?;
    if entropy_coefficient == 0.0 {
        return Ok(surrogate);
    }
    Ok((surrogate - (new.entropy.sum(D::Minus1)? * entropy_coefficient)?)?)
}

/// What the policy did on the tokens of one micro-batch.
///
/// # Errors
/// If the tensor library refuses.
pub fn policy_stats(new: &LogProbs, old_logp: &[f32], advantages: &[f32], clip: f64, loss: f64) -> Result<PolicyStats> {
    let (logp, entropy) = (new.logp.to_vec1::<f32>()?, new.entropy.to_vec1::<f32>()?);
    let mut stats = PolicyStats { tokens: logp.len() as f64, loss, ..PolicyStats::default() };
    for (t, (&new, &old)) in logp.iter().zip(old_logp).enumerate() {
        let difference = f64::from(new) - f64::from(old);
        let log_ratio = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO);
        let ratio = log_ratio.exp();
        let cut = if advantages[t] > 0.0 { ratio > 1.0 + clip } else { ratio < 1.0 - clip };
        stats.clipped += f64::from(u8::from(cut));
        stats.approx_kl += ratio - 1.0 - log_ratio;
        stats.ratio_max = stats.ratio_max.max(ratio);
        stats.logp_gap_max = stats.logp_gap_max.max(difference.abs());
        stats.entropy += f64::from(entropy[t]);
    }
    Ok(stats)
}

/// Clipped value loss, summed over tokens: `½ Σ max((V − R)², (V_old + clip(V − V_old, ±ε) − R)²)`.
///
/// All arguments are `[N]`.
///
/// # Errors
/// If the tensor library refuses.
pub fn value_loss(values: &Tensor, old_values: &Tensor, returns: &Tensor, clip: f64) -> Result<Tensor> {
    let kept = (old_values + (values - old_values)?.clamp(-clip, clip)?)?;
    let plain = (values - returns)?.sqr()?;
    let clipped = (kept - returns)?.sqr()?;
    Ok((plain.maximum(&clipped)?.sum(D::Minus1)? * 0.5)?)
}

/// A CPU vector as a tensor.
pub(super) fn vector(values: &[f32]) -> Result<Tensor> {
    Ok(Tensor::from_slice(values, values.len(), &Device::Cpu)?)
}

impl PolicyStats {
    /// The numbers in the order of the fields, for other ranks.
    pub fn to_array(&self) -> [f64; 7] {
        let Self { tokens, loss, entropy, clipped, approx_kl, ratio_max, logp_gap_max } = *self;
        [tokens, loss, entropy, clipped, approx_kl, ratio_max, logp_gap_max]
    }

    /// Reverses [`Self::to_array`].
    pub fn from_array([tokens, loss, entropy, clipped, approx_kl, ratio_max, logp_gap_max]: [f64; 7]) -> Self {
        Self { tokens, loss, entropy, clipped, approx_kl, ratio_max, logp_gap_max }
    }

    /// Takes in another micro-batch.
    pub fn add(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.loss += other.loss;
        self.entropy += other.entropy;
        self.clipped += other.clipped;
        self.approx_kl += other.approx_kl;
        self.ratio_max = self.ratio_max.max(other.ratio_max);
        self.logp_gap_max = self.logp_gap_max.max(other.logp_gap_max);
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;

    fn log_probs(logp: &Tensor) -> LogProbs {
        LogProbs { logp: logp.clone(), entropy: logp.zeros_like().unwrap() }
    }

    /// Value and gradient of `loss` at `at`.
    fn slope(at: &[f32], loss: impl Fn(&Tensor) -> Tensor) -> (f64, Vec<f32>) {
        let x = Var::from_tensor(&vector(at).unwrap()).unwrap();
        let value = loss(x.as_tensor());
        let grads = value.backward().unwrap();
        let gradient = grads.get(&x).map_or(vec![0.0; at.len()], |g| g.to_vec1().unwrap());
        (f64::from(value.to_scalar::<f32>().unwrap()), gradient)
    }

    #[test]
    fn the_clip_cuts_the_gradient_only_where_the_step_has_gone_far_enough() {
        let (old, advantages) = (vector(&[0.0; 5]).unwrap(), vector(&[1.0, 1.0, -1.0, -1.0, 1.0]).unwrap());
        // Ratios 1.5 and 0.5 on either side, and 1.
        let logp: Vec<f32> = [1.5f32, 0.5, 1.5, 0.5, 1.0].iter().map(|r| r.ln()).collect();
        let (value, gradient) = slope(&logp, |x| policy_loss(&log_probs(x), &old, &advantages, 0.2, 0.0).unwrap());
        assert!((value + (1.2 + 0.5 - 1.5 - 0.8 + 1.0)).abs() < 1e-5, "{value}");
        for (got, want) in gradient.iter().zip([0.0, -0.5, 1.5, 0.0, -1.0]) {
            assert!((got - want).abs() < 1e-5, "{gradient:?}");
        }
        let stats =
            policy_stats(&log_probs(&vector(&logp).unwrap()), &[0.0; 5], &[1.0, 1.0, -1.0, -1.0, 1.0], 0.2, value);
        let stats = stats.unwrap();
        assert_eq!((stats.clipped, stats.tokens), (2.0, 5.0));
        assert!((stats.ratio_max - 1.5).abs() < 1e-6);
    }

    #[test]
    fn value_loss_matches_its_definition_and_finite_differences() {
        let (old, returns) = ([0.0f32, 0.0, 1.0], [1.0f32, -1.0, 1.2]);
        let loss = |x: &Tensor| value_loss(x, &vector(&old).unwrap(), &vector(&returns).unwrap(), 0.2).unwrap();
        let at = [0.5f32, 0.1, 1.05];
        let (value, gradient) = slope(&at, loss);
        let by_hand: f64 = (0..3)
            .map(|i| {
                let (v, o, r) = (f64::from(at[i]), f64::from(old[i]), f64::from(returns[i]));
                0.5 * (v - r).powi(2).max((o + (v - o).clamp(-0.2, 0.2) - r).powi(2))
            })
            .sum();
        assert!((value - by_hand).abs() < 1e-6);
        for i in 0..3 {
            let step = |h: f32| {
                let mut moved = at;
                moved[i] += h;
                slope(&moved, loss).0
            };
            let difference = (step(1e-3) - step(-1e-3)) / 2e-3;
            assert!((difference - f64::from(gradient[i])).abs() < 1e-3, "{i}: {difference} {gradient:?}");
        }
    }
}
