//! Actor and critic take their steps one after the other: a gradient that is not finite holds back its own model only.

use tandem_stages::ppo::update::Lesson;

use crate::toy::{Toy, Variant, count_a, update_config};

/// Steps that actor and critic take on lessons of which the first was changed by `spoil`.
fn steps(spoil: fn(&mut Lesson)) -> (u64, u64) {
    let (mut toy, _, mut lessons) = Toy::new(1, Variant::Correct, count_a).explore(0);
    spoil(&mut lessons[0]);
    let lessons: Vec<&Lesson> = lessons.iter().collect();
    let outcome = toy.learn(&lessons, &update_config());
    let steps = (toy.actor.optimizer().step(), toy.critic.optimizer().step());
    assert_eq!((outcome.actor_is_finite, outcome.critic_is_finite), (steps.0 == 1, steps.1 == 1));
    // Nothing of the gradient that was left out remains for the next update.
    let (_, _, next) = Toy::new(1, Variant::Correct, count_a).explore(1);
    let outcome = toy.learn(&next.iter().collect::<Vec<_>>(), &update_config());
    assert!(outcome.actor_is_finite && outcome.critic_is_finite);
    steps
}

#[test]
fn a_gradient_that_is_not_finite_holds_back_its_own_model() {
    assert_eq!(steps(|_| ()), (1, 1));
    assert_eq!(steps(|lesson| lesson.returns[0] = f32::NAN), (1, 0));
    // One advantage spoils all when they are whitened; the critic does not learn from them.
    assert_eq!(steps(|lesson| lesson.advantages[0] = f32::INFINITY), (0, 1));
}
