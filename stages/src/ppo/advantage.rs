//! From facts to learning signals: rewards per token, advantages and returns.
//!
//! Advantages are derived from the committed experience each time, never stored.

/// What the reward of a token is made of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RewardShape {
    /// Penalty per nat of `log π − log π_ref`.
    pub kl_coefficient: f64,
    /// Scores are cut to ± this.
    pub score_clip: Option<f64>,
    /// Taken from the score of a response that did not end by itself.
    pub missing_eos_penalty: f64,
}

impl RewardShape {
    /// The score as it enters the rewards.
    pub fn shaped_score(&self, score: f32, ended: bool) -> f64 {
        let score = f64::from(score);
        let score = self.score_clip.map_or(score, |clip| score.clamp(-clip, clip));
        if ended { score } else { score - self.missing_eos_penalty }
    }

    /// Reward of each response token: `−β (logp − ref_logp)`, and the score on the last one, which is the token that
    /// ended the response if one did.
    pub fn token_rewards(&self, logp: &[f32], ref_logp: &[f32], score: f32, ended: bool) -> Vec<f64> {
        let mut rewards: Vec<f64> = logp
            .iter()
            .zip(ref_logp)
            .map(|(&logp, &reference)| -self.kl_coefficient * (f64::from(logp) - f64::from(reference)))
            .collect();
        if let Some(last) = rewards.last_mut() {
            *last += self.shaped_score(score, ended);
        }
        rewards
    }
}

/// Generalised advantage estimation (Schulman et al. 2016, equations 11 and 16) over one response:
/// `δ_t = r_t + γ V_{t+1} − V_t` with `V = 0` after the end, `A_t = δ_t + γλ A_{t+1}`, `return_t = A_t + V_t`.
///
/// Returns (advantages, returns), one each per token.
pub fn gae(rewards: &[f64], values: &[f32], gamma: f64, lambda: f64) -> (Vec<f32>, Vec<f32>) {
    let mut advantages = vec![0.0; rewards.len()];
    let (mut next_value, mut next_advantage) = (0.0, 0.0);
    for t in (0..rewards.len()).rev() {
        let value = f64::from(values[t]);
        next_advantage = rewards[t] + gamma * next_value - value + gamma * lambda * next_advantage;
        advantages[t] = next_advantage;
        next_value = value;
    }
    let returns = advantages.iter().zip(values).map(|(a, &v)| (a + f64::from(v)) as f32).collect();
    (advantages.iter().map(|&a| a as f32).collect(), returns)
}

/// Shifts and scales the advantages of all tokens of a mini-batch to mean 0 and standard deviation 1.
///
/// The whole mini-batch at once: micro-batches are an accident of memory and must not show in the result.
pub fn whiten<'a>(advantages: impl IntoIterator<Item = &'a mut Vec<f32>>) {
    let mut all: Vec<&mut f32> = advantages.into_iter().flatten().collect();
    let count = all.len() as f64;
    if all.len() < 2 {
        return;
    }
    let mean = all.iter().map(|a| f64::from(**a)).sum::<f64>() / count;
    let variance = all.iter().map(|a| (f64::from(**a) - mean).powi(2)).sum::<f64>() / count;
    let scale = 1.0 / (variance + 1e-8).sqrt();
    for a in &mut all {
        **a = ((f64::from(**a) - mean) * scale) as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: RewardShape = RewardShape { kl_coefficient: 0.5, score_clip: Some(2.0), missing_eos_penalty: 1.0 };

    #[test]
    fn the_score_lands_on_the_last_token_and_kl_on_every_token() {
        let rewards = SHAPE.token_rewards(&[-1.0, -2.0, -1.0], &[-2.0, -2.0, 0.0], 3.0, true);
        assert_eq!(rewards, [-0.5, 0.0, 0.5 + 2.0]);
        assert_eq!(SHAPE.token_rewards(&[-1.0], &[-1.0], 0.5, false), [-0.5], "no end: the penalty");
    }

    #[test]
    fn gae_matches_the_sum_it_stands_for() {
        let (rewards, values) = ([0.1, -0.2, 0.0, 1.0], [0.3f32, 0.1, -0.4, 0.2]);
        let (gamma, lambda) = (0.9, 0.8);
        let (advantages, returns) = gae(&rewards, &values, gamma, lambda);
        for t in 0..4 {
            let mut expected = 0.0;
            for k in t..4 {
                let next = if k + 1 < 4 { f64::from(values[k + 1]) } else { 0.0 };
                let delta = rewards[k] + gamma * next - f64::from(values[k]);
                expected += (gamma * lambda).powi((k - t) as i32) * delta;
            }
            assert!((f64::from(advantages[t]) - expected).abs() < 1e-6, "t = {t}");
            assert!((f64::from(returns[t]) - expected - f64::from(values[t])).abs() < 1e-6);
        }
        // λ = γ = 1: the return is the plain sum of rewards to come.
        let (_, returns) = gae(&rewards, &values, 1.0, 1.0);
        assert!((returns[0] - 0.9).abs() < 1e-6 && (returns[3] - 1.0).abs() < 1e-6);
    }

    #[test]
    fn whitening_is_over_all_tokens_together() {
        let mut rows = [vec![1.0, 2.0], vec![3.0], vec![10.0, -4.0, 0.0]];
        whiten(rows.iter_mut());
        let all: Vec<f64> = rows.iter().flatten().map(|a| f64::from(*a)).collect();
        assert!(all.iter().sum::<f64>().abs() < 1e-5);
        assert!((all.iter().map(|a| a * a).sum::<f64>() / 6.0 - 1.0).abs() < 1e-5);
    }
}
