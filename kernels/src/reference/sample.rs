//! Twin of the sampler: the whole distribution that a token is drawn from.

use crate::sample::SamplingParams;

/// Probabilities of all tokens after penalty, temperature, top-k, top-p and min-p, in that order; 0 for excluded ones.
pub fn sampling_probabilities(logits: &[f64], history: &[u32], params: &SamplingParams) -> Vec<f64> {
    let mut scores = logits.to_vec();
    let penalty = f64::from(params.repetition_penalty);
    for (token, score) in scores.iter_mut().enumerate() {
        if history.contains(&(token as u32)) {
            *score = if *score > 0.0 { *score / penalty } else { *score * penalty };
        }
    }
    let mut ranked: Vec<usize> = (0..scores.len()).collect();
    // A stable sort: of equals the lower id stays first.
    ranked.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    let mut kept = if params.temperature == 0.0 {
        vec![(ranked[0], 1.0)]
    } else {
        let scaled: Vec<f64> = ranked.iter().map(|&token| scores[token] / f64::from(params.temperature)).collect();
        let count = if params.top_k == 0 { ranked.len() } else { params.top_k.min(ranked.len()) };
        normalised(ranked[..count].iter().copied().zip(scaled[..count].iter().map(|score| (score - scaled[0]).exp())))
    };
    if params.top_p < 1.0 {
        let mut before = 0.0;
        let within = kept.iter().take_while(|&&(_, probability)| {
            let keep = before < f64::from(params.top_p);
            before += probability;
            keep
        });
        kept = normalised(within.copied());
    }
    let floor = f64::from(params.min_p) * kept[0].1;
    kept.retain(|&(_, probability)| probability >= floor);
    let mut probabilities = vec![0.0; logits.len()];
    for (token, probability) in normalised(kept.into_iter()) {
        probabilities[token] = probability;
    }
    probabilities
}

fn normalised(weights: impl Iterator<Item = (usize, f64)>) -> Vec<(usize, f64)> {
    let weights: Vec<(usize, f64)> = weights.collect();
    let total: f64 = weights.iter().map(|(_, weight)| weight).sum();
    weights.into_iter().map(|(token, weight)| (token, weight / total)).collect()
}
