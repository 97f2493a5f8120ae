//! The pairwise logistic loss (Bradley and Terry, 1952; Ouyang et al., 2022, equation 1), with a margin (Touvron et al.,
//! "Llama 2", 2023, equation 2) and centring (Eisenstein et al., "Helping or Herding?", 2023, equation 3):
//!
//! `−log σ(c − r − margin) + centring · (c + r)²`, where `c` and `r` are the scores of the chosen and the rejected response.

/// The loss of pairs of scores.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PairLoss {
    /// Weight of `(c + r)²`.
    pub centring: f64,
}

impl PairLoss {
    /// Sum of the loss over pairs `scores[2k], scores[2k + 1]` (chosen, rejected) with `margins[k]`, and its derivative by
    /// each score.
    pub fn of(&self, scores: &[f32], margins: &[f32]) -> (f64, Vec<f32>) {
        let mut loss = 0.0;
        let mut slopes = Vec::with_capacity(scores.len());
        for (pair, &margin) in scores.chunks_exact(2).zip(margins) {
            let (chosen, rejected) = (f64::from(pair[0]), f64::from(pair[1]));
            let lead = chosen - rejected - f64::from(margin);
            let sum = chosen + rejected;
            // −log σ(x) = log(1 + e^−x), without overflow for x far below zero.
            loss += (-lead.abs()).exp().ln_1p() + (-lead).max(0.0) + self.centring * sum * sum;
            // d/dx −log σ(x) = −σ(−x).
            let logistic = -1.0 / (1.0 + lead.exp());
            let centre = 2.0 * self.centring * sum;
            slopes.extend([(logistic + centre) as f32, (-logistic + centre) as f32]);
        }
        (loss, slopes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCORES: [f32; 8] = [0.5, -0.25, 1.0, 1.0, -3.0, 2.5, 0.0, 0.0];
    const MARGINS: [f32; 4] = [0.25, 0.0, 1.0, 0.0];

    #[test]
    fn slopes_are_those_of_the_loss() {
        let loss = PairLoss { centring: 0.1 };
        let slopes = loss.of(&SCORES, &MARGINS).1;
        // A power of two, so that the scores move by exactly this much.
        let step = 2f32.powi(-7);
        for index in 0..SCORES.len() {
            let moved = |by: f32| {
                let mut scores = SCORES;
                scores[index] += by;
                loss.of(&scores, &MARGINS).0
            };
            let slope = (moved(step) - moved(-step)) / f64::from(2.0 * step);
            assert!((slope - f64::from(slopes[index])).abs() < 1e-5, "{index}: {slope} {}", slopes[index]);
        }
    }

    #[test]
    fn equal_scores_cost_one_bit_and_nothing_overflows() {
        let loss = PairLoss { centring: 0.0 };
        let (value, slopes) = loss.of(&[0.0, 0.0], &[0.0]);
        assert!((value - std::f64::consts::LN_2).abs() < 1e-15);
        assert_eq!(slopes, [-0.5, 0.5]);
        let (value, slopes) = loss.of(&[-2000.0, 2000.0, 2000.0, -2000.0], &[0.0, 0.0]);
        assert_eq!(value, 4000.0);
        assert_eq!(slopes, [-1.0, 1.0, 0.0, 0.0]);
    }
}
