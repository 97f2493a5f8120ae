//! Proof that PPO works: two tasks whose best outcome is known exactly, and mutations that must be noticed.

mod mutations;
mod separate;
mod toy;

use toy::{C, Iteration, MAX_RESPONSE, Toy, Variant, count_a, ends, optimum};

/// Whether a run of the token-count task went as it must. The last part: above the optimum means that KL is miscounted.
fn token_count_works(iterations: &[Iteration]) -> Result<(), String> {
    let late = &iterations[20..];
    let mean = late.iter().map(|i| i.objective).sum::<f64>() / late.len() as f64;
    let error = (late.iter().map(|i| i.standard_error.powi(2)).sum::<f64>()).sqrt() / late.len() as f64;
    let best = optimum(C / MAX_RESPONSE as f64, 0.0);
    let fraction = late.iter().map(|i| i.fraction_a).sum::<f64>() / late.len() as f64;
    match () {
        () if mean < 0.73 => Err(format!("objective {mean:.4}, at least 0.73 wanted")),
        () if mean > best + 4.0 * error => {
            Err(format!("objective {mean:.4} ± {error:.4} is above the optimum {best:.4}"))
        }
        () if !(0.50..=0.66).contains(&fraction) => Err(format!("fraction of A {fraction:.3}, 0.586 wanted")),
        () => Ok(()),
    }
}

/// Whether a run of the stop task went as it must.
fn stop_works(iterations: &[Iteration]) -> Result<(), String> {
    let last: f64 = iterations[27..30].iter().map(|i| i.eos_rate).sum::<f64>() / 3.0;
    if last >= 0.93 { Ok(()) } else { Err(format!("EOS rate {last:.3} after 30 iterations, 0.93 wanted")) }
}

#[test]
fn the_optimum_is_the_published_one() {
    assert!((optimum(C / MAX_RESPONSE as f64, 0.0) - 0.7617).abs() < 5e-5);
}

#[test]
fn before_training_the_policy_is_uniform() {
    let (toy, completions, _) = Toy::new(1, Variant::Correct, count_a).explore(0);
    let uniform = -(16f32).ln();
    assert!(completions.iter().flat_map(|c| &c.logp).all(|logp| (logp - uniform).abs() < 1e-6));
    // Means over ten rollouts of 240 against the exact expectations, within four standard errors.
    let mut toy = toy;
    let (mut score, mut eos, mut length) = (0.0, 0.0, 0.0);
    for step in 1..=10 {
        let (next, completions, _) = toy.explore(step);
        toy = next;
        let count = completions.len() as f64 * 10.0;
        score += completions.iter().map(count_a).sum::<f64>() / count;
        eos += completions.iter().map(ends).sum::<f64>() / C / count;
        length += completions.iter().map(|c| c.ids.len() as f64).sum::<f64>() / count;
    }
    assert!((score - 0.1427).abs() < 4.0 * 0.21 / 2400f64.sqrt(), "score {score}");
    assert!((eos - 0.4755).abs() < 4.0 * 0.5 / 2400f64.sqrt(), "EOS rate {eos}");
    assert!((length - 7.61).abs() < 4.0 * 3.2 / 2400f64.sqrt(), "length {length}");
}

#[test]
fn token_count_reaches_the_optimum_and_not_more() {
    for seed in [1, 2, 3] {
        let iterations = Toy::new(seed, Variant::Correct, count_a).run(60);
        assert!(iterations.iter().all(|i| i.first_ratio_max == 1.0), "the first update's ratio is exactly 1");
        token_count_works(&iterations).unwrap_or_else(|problem| panic!("seed {seed}: {problem}"));
    }
}

#[test]
fn greedy_rollouts_are_noticed() {
    let iterations = Toy::new(1, Variant::Greedy, count_a).run(40);
    assert!(token_count_works(&iterations).is_err());
}

#[test]
fn the_policy_learns_to_stop() {
    stop_works(&Toy::new(1, Variant::Correct, ends).run(30)).unwrap();
}

#[test]
fn an_end_left_out_of_the_loss_is_noticed() {
    assert!(stop_works(&Toy::new(1, Variant::EndMasked, ends).run(30)).is_err());
}
