//! One mini-batch update of actor and critic.

use serde::{Deserialize, Serialize};
use tandem_engine::{Engine, Recompute, Train};

use super::advantage::whiten;
use super::loss::{PolicyStats, policy_loss, policy_stats, value_loss, vector};
use super::rollout::{ResponseBatch, Sequence, micro_batches};
use crate::error::Result;

/// Knobs of an update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct UpdateConfig {
    /// How far the ratio may move before its gradient is cut.
    pub policy_clip: f64,
    /// How far a value may move before its gradient is cut.
    pub value_clip: f64,
    /// Weight of the entropy bonus.
    pub entropy_coefficient: f64,
    /// Whether advantages are whitened over the mini-batch.
    pub whiten: bool,
    /// Most tokens in one forward.
    pub tokens_per_micro_batch: usize,
    /// Whether activations are recomputed.
    pub recompute: Recompute,
}

/// A sampled response with everything that an update learns from.
#[derive(Clone, Debug, PartialEq)]
pub struct Lesson {
    /// Name of the sample.
    pub sample: u64,
    /// The prompt.
    pub prompt: Vec<u32>,
    /// The response, the token that ended it included: to stop is an action like any other.
    pub response: Vec<u32>,
    /// Log-probability of each response token when it was sampled.
    pub old_logp: Vec<f32>,
    /// Value before each response token when it was sampled.
    pub old_values: Vec<f32>,
    /// Advantage of each response token.
    pub advantages: Vec<f32>,
    /// Return from each response token on.
    pub returns: Vec<f32>,
}

impl Lesson {
    /// Prompt and response.
    pub fn sequence(&self) -> Sequence<'_> {
        Sequence { sample: self.sample, prompt: &self.prompt, response: &self.response }
    }
}

/// What an update did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct UpdateOutcome {
    /// Sums over the tokens of the mini-batch.
    pub policy: PolicyStats,
    /// Value loss, summed over tokens.
    pub value_loss: f64,
    /// Norm of the actor's gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate of the actor.
    pub lr: f64,
    /// Whether the models moved: both do, or neither.
    pub applied: bool,
}

/// Which of the two models an update moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Learners {
    /// Actor and critic.
    Both,
    /// The critic alone, while it still knows nothing.
    Critic,
}

/// One optimizer step of actor and critic on the mini-batch `lessons`.
///
/// Sums over all response tokens are divided by their number in the whole mini-batch, so the micro-batches' sizes do not
/// matter. If either gradient is not finite neither model moves.
///
/// # Errors
/// If a sequence does not fit a model.
pub fn update(
    actor: &mut Engine<Train>,
    critic: &mut Engine<Train>,
    lessons: &[&Lesson],
    learners: Learners,
    config: &UpdateConfig,
) -> Result<UpdateOutcome> {
    let mut advantages: Vec<Vec<f32>> = lessons.iter().map(|lesson| lesson.advantages.clone()).collect();
    if config.whiten {
        whiten(advantages.iter_mut());
    }
    let sequences: Vec<Sequence<'_>> = lessons.iter().map(|lesson| lesson.sequence()).collect();
    let (mut policy, mut value_total) = (PolicyStats::default(), 0.0);
    for members in micro_batches(&sequences, config.tokens_per_micro_batch)? {
        let batch = ResponseBatch::new(members.iter().map(|&index| sequences[index]));
        let of = |part: fn(&Lesson) -> &[f32]| -> Vec<f32> {
            members.iter().flat_map(|&index| part(lessons[index]).iter().copied()).collect()
        };
        let old_logp = of(|lesson| &lesson.old_logp);
        let advantage: Vec<f32> = members.iter().flat_map(|&index| advantages[index].iter().copied()).collect();
        let (old, weight) = (vector(&old_logp)?, vector(&advantage)?);
        let loss = |new: &_| policy_loss(new, &old, &weight, config.policy_clip, config.entropy_coefficient);
        let (value, new) =
            actor.accumulate_log_probs(&batch.batch, &batch.rows, &batch.labels, None, config.recompute, loss)?;
        policy.add(&policy_stats(&new, &old_logp, &advantage, config.policy_clip, value)?);

        let (old_values, returns) = (vector(&of(|lesson| &lesson.old_values))?, vector(&of(|lesson| &lesson.returns))?);
        let loss = |values: &_| value_loss(values, &old_values, &returns, config.value_clip);
        value_total += critic.accumulate_scores(&batch.batch, &batch.rows, None, config.recompute, loss)?.0;
    }
    let tokens = policy.tokens;
    let grad_norm = actor.grad_norm(tokens)?;
    let applied = grad_norm.is_finite() && critic.grad_norm(tokens)?.is_finite();
    let lr = actor.optimizer().config().schedule.lr(actor.optimizer().step() + 1);
    if applied && learners == Learners::Both {
        actor.step(tokens)?;
    } else {
        actor.clear_grads()?;
    }
    if applied {
        critic.step(tokens)?;
    } else {
        critic.clear_grads()?;
    }
    Ok(UpdateOutcome { policy, value_loss: value_total, grad_norm, lr, applied })
}
