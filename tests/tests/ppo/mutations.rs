//! Faults of other toolkits as test-only variants of single functions: each must fail the check that the product passes.

use tandem_engine::model::unit::UnitBuffer;
use tandem_engine::parallel::{Gradients, Placement};
use tandem_engine::{Dropout, Recompute};
use tandem_stages::ppo::advantage::{RewardShape, gae, whiten};
use tandem_stages::ppo::rollout::ResponseBatch;
use tandem_stages::ppo::update::Lesson;

use crate::toy::{Toy, Variant, count_a, flat, update_config};

/// With λ = 0 an advantage looks one step ahead only, so the score must show at the last token and nowhere else.
fn score_is_on_the_last_token(token_rewards: impl Fn(&[f32], &[f32], f32) -> Vec<f64>) -> bool {
    let (logp, values) = ([-1.0, -2.0, -1.5], [0.25f32, 0.5, -0.5]);
    let mut values = values.to_vec();
    let rewards = token_rewards(&logp, &logp, 2.0);
    values.resize(rewards.len(), 0.0);
    let (advantages, _) = gae(&rewards, &values, 1.0, 0.0);
    advantages[..3] == [0.25, -1.0, 2.5]
}

#[test]
fn a_score_one_position_late_is_noticed() {
    let shape = RewardShape { kl_coefficient: 0.1, score_clip: None, missing_eos_penalty: 0.0 };
    assert!(score_is_on_the_last_token(|logp, reference, score| shape.token_rewards(logp, reference, score, true)));
    assert!(!score_is_on_the_last_token(|logp, reference, score| {
        let mut rewards = shape.token_rewards(logp, reference, 0.0, true);
        rewards.push(f64::from(score));
        rewards
    }));
}

/// Before any update the policy is the one that sampled: every ratio is exactly 1.
fn first_ratio_is_one(old_logp: impl Fn(&Toy, &Lesson) -> Vec<f32>) -> bool {
    // A few updates first, so that the policy is no longer uniform and dropout can show.
    let (mut toy, _, lessons) = Toy::new(5, Variant::Correct, count_a).explore(0);
    toy.learn(&lessons.iter().collect::<Vec<_>>(), &update_config());
    let (mut toy, _, mut lessons) = toy.explore(1);
    lessons.truncate(40);
    for lesson in &mut lessons {
        lesson.old_logp = old_logp(&toy, lesson);
    }
    let outcome = toy.learn(&lessons.iter().collect::<Vec<_>>(), &update_config());
    outcome.policy.ratio_max == 1.0 && outcome.policy.logp_gap_max == 0.0
}

#[test]
fn old_log_probs_with_dropout_are_noticed() {
    assert!(first_ratio_is_one(|_, lesson| lesson.old_logp.clone()));
    assert!(!first_ratio_is_one(|toy, lesson| {
        let batch = ResponseBatch::new([lesson.sequence()]);
        let dropout = Some(Dropout { probability: 0.1, seed: 1, step: 1 });
        let mut grads = Gradients::new(&Placement::solo(), &toy.actor.model().layouts()).unwrap();
        let trace = toy.actor.model().trace(&batch.batch, &batch.rows, dropout, Recompute::Off).unwrap();
        let zero = |new: &tandem_engine::LogProbs| Ok((new.logp.sum_all()? * 0.0)?);
        flat(&trace.backward_log_probs(&batch.labels, &mut grads, zero).unwrap().unwrap().1.logp)
    }));
}

/// The size of micro-batches is a matter of memory; the updated weights must not show it.
fn micro_batches_do_not_show(prepare: impl Fn(&mut [Lesson], usize)) -> bool {
    let weights_after = |tokens_per_micro_batch: usize| {
        let (mut toy, _, mut lessons) = Toy::new(6, Variant::Correct, count_a).explore(0);
        lessons.truncate(60);
        prepare(&mut lessons, tokens_per_micro_batch);
        // Two updates: the first one only moves a head that starts at zero.
        for _ in 0..2 {
            let config = tandem_stages::ppo::update::UpdateConfig { tokens_per_micro_batch, ..update_config() };
            toy.learn(&lessons.iter().collect::<Vec<_>>(), &config);
        }
        toy.actor.model().units().unwrap().iter().map(UnitBuffer::flat).flat_map(flat).collect::<Vec<f32>>()
    };
    let (whole, parts) = (weights_after(4096), weights_after(64));
    let largest = whole.iter().fold(0f32, |most, w| most.max(w.abs()));
    let gap = whole.iter().zip(&parts).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
    // An Adam step has the size of the learning rate, 1e-3, whatever the gradient's: sums in another order show at 1e-5.
    gap <= 2e-5 * largest.max(1.0)
}

#[test]
fn whitening_over_one_micro_batch_only_is_noticed() {
    assert!(micro_batches_do_not_show(|_, _| {}));
    assert!(!micro_batches_do_not_show(|lessons, tokens| {
        // Whitened here part by part; whitening the whole again afterwards does not undo it.
        let mut start = 0;
        while start < lessons.len() {
            let mut end = start;
            let mut held = 0;
            while end < lessons.len() && held + lessons[end].prompt.len() + lessons[end].response.len() <= tokens {
                held += lessons[end].prompt.len() + lessons[end].response.len();
                end += 1;
            }
            whiten(lessons[start..end].iter_mut().map(|lesson| &mut lesson.advantages));
            start = end;
        }
    }));
}
