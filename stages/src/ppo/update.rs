//! One mini-batch update of actor and critic.

use serde::{Deserialize, Serialize};
use tandem_engine::{Engine, LogProbs, MicroBatch, Recompute, Train};

use super::advantage::whiten;
use super::loss::{PolicyStats, policy_loss, policy_stats, value_loss, vector};
use super::rollout::{ResponseBatch, Sequence};
use crate::error::Result;
use crate::ranks::Team;

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
    /// Log-probability of each response token under the policy as it was when it was sampled.
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
    /// Whether the actor's gradient is finite. Otherwise it stayed as it was.
    pub actor_is_finite: bool,
    /// Whether the critic's gradient is finite. Otherwise it stayed as it was.
    pub critic_is_finite: bool,
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
/// matter. The actor takes its step before the critic's gradient is begun, so that gradient and activations of one model are held
/// at a time. A model whose gradient is not finite stays as it is; the other moves, since what it learns from, the advantages and
/// returns, was fixed before either.
///
/// # Errors
/// If a sequence does not fit a model.
pub fn update(
    team: &Team,
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
    let lengths: Vec<usize> = lessons.iter().map(|lesson| lesson.prompt.len() + lesson.response.len()).collect();
    let share = team.share(&lengths, config.tokens_per_micro_batch)?;
    let micro_batch = |members: &Vec<usize>| {
        let batch = ResponseBatch::new(members.iter().map(|&index| lessons[index].sequence()));
        MicroBatch { batch: batch.batch, rows: batch.rows, labels: batch.labels, dropout: None }
    };
    let passes: Vec<_> = share.passes.iter().map(|(_, members)| members.as_ref().map(micro_batch)).collect();
    // What one pass has of each lesson, end to end.
    let of = |pass: usize, part: &dyn Fn(usize) -> Vec<f32>| -> Vec<f32> {
        share.passes[pass].1.iter().flatten().flat_map(|&index| part(index)).collect()
    };
    let old_logp = |pass| of(pass, &|index| lessons[index].old_logp.clone());
    let advantage = |pass| of(pass, &|index| advantages[index].clone());

    let loss = |pass: usize, new: &LogProbs| {
        let (old, weight) = (vector(&old_logp(pass))?, vector(&advantage(pass))?);
        policy_loss(new, &old, &weight, config.policy_clip, config.entropy_coefficient)
    };
    let mut policies = Vec::new();
    let results = actor.accumulate_all_log_probs(&passes, config.recompute, loss)?;
    for (pass, result) in results.into_iter().enumerate() {
        if let Some((value, new)) = result {
            let stats = policy_stats(&new, &old_logp(pass), &advantage(pass), config.policy_clip, value)?;
            policies.push((share.passes[pass].0, stats.to_array()));
        }
    }
    let mut policy = PolicyStats::default();
    for stats in team.gather(&policies, share.all)?.into_iter().flatten() {
        policy.add(&PolicyStats::from_array(stats));
    }
    let tokens = policy.tokens;
    let moved = match learners {
        Learners::Both => actor.step(tokens)?,
        Learners::Critic => actor.skip(tokens)?,
    };
    let actor_is_finite = moved.grad_norm.is_finite();

    let loss = |pass: usize, values: &_| {
        let old = vector(&of(pass, &|index| lessons[index].old_values.clone()))?;
        let returns = vector(&of(pass, &|index| lessons[index].returns.clone()))?;
        value_loss(values, &old, &returns, config.value_clip)
    };
    let results = critic.accumulate_all_scores(&passes, config.recompute, loss)?;
    let numbers = share.passes.iter().map(|(number, _)| *number);
    let values: Vec<_> = numbers.zip(results).filter_map(|(number, result)| Some((number, [result?.0]))).collect();
    let value_total = team.gather(&values, share.all)?.into_iter().flatten().fold(0.0, |total, [loss]| total + loss);
    let critic_is_finite = critic.step(tokens)?.applied;
    Ok(UpdateOutcome {
        policy,
        value_loss: value_total,
        grad_norm: moved.grad_norm,
        lr: moved.lr,
        actor_is_finite,
        critic_is_finite,
    })
}
