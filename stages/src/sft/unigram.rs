//! The model that any other must beat: tokens at random, each as often as it occurs in the training data.

/// Perplexity on `eval` of the token frequencies of `train`, each count raised by one (Laplace), over `vocab_size` tokens.
/// `None` if there is nothing to evaluate.
pub(super) fn perplexity<'a>(
    train: impl Iterator<Item = &'a [u32]>,
    eval: impl Iterator<Item = &'a [u32]>,
    vocab_size: usize,
) -> Option<f64> {
    let mut counts = vec![1u64; vocab_size];
    for &id in train.flatten() {
        counts[id as usize] += 1;
    }
    let total = counts.iter().sum::<u64>() as f64;
    let (mut sum, mut tokens) = (0.0, 0u64);
    for &id in eval.flatten() {
        sum += (counts[id as usize] as f64 / total).ln();
        tokens += 1;
    }
    (tokens > 0).then(|| (-sum / tokens as f64).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequencies_with_one_added() {
        let train: [&[u32]; 2] = [&[0, 0, 1], &[0]];
        let eval: [&[u32]; 1] = [&[0, 2]];
        // Counts 4, 2, 1 of 7.
        let expected = (4.0f64 / 7.0 / 7.0).powf(-0.5);
        let found = perplexity(train.into_iter(), eval.into_iter(), 3).unwrap();
        assert!((found - expected).abs() < 1e-12);
        assert_eq!(perplexity(train.into_iter(), std::iter::empty(), 3), None);
    }
}
