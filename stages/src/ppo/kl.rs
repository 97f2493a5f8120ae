//! The price of deviating from the reference policy: fixed, or steered towards a target.

use crate::config::KlConfig;

/// The KL coefficient over the course of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct KlController {
    coefficient: f64,
    target: Option<f64>,
    horizon: f64,
}

impl KlController {
    /// A controller at its first coefficient.
    pub fn new(config: &KlConfig) -> Self {
        Self { coefficient: config.coefficient, target: config.target, horizon: config.horizon }
    }

    /// The same controller with a coefficient that was saved.
    pub fn at(self, coefficient: f64) -> Self {
        Self { coefficient, ..self }
    }

    /// Penalty per nat.
    pub fn coefficient(&self) -> f64 {
        self.coefficient
    }

    /// Takes note of `samples` responses with a mean KL of `kl` nats (Ziegler et al. 2019, section 2.2):
    /// `e = clip(kl / target − 1, ±0.2)`, `coefficient ← coefficient · (1 + e · samples / horizon)`.
    pub fn observe(&mut self, kl: f64, samples: usize) {
        if let Some(target) = self.target {
            let error = (kl / target - 1.0).clamp(-0.2, 0.2);
            self.coefficient *= 1.0 + error * samples as f64 / self.horizon;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_coefficient_moves_against_the_error_and_never_fast() {
        let config = KlConfig { coefficient: 0.1, target: Some(6.0), horizon: 100.0 };
        let mut kl = KlController::new(&config);
        kl.observe(6.0, 50);
        assert_eq!(kl.coefficient(), 0.1);
        kl.observe(600.0, 50);
        assert!((kl.coefficient() - 0.1 * 1.1).abs() < 1e-12, "an error is cut at a fifth");
        kl.observe(0.0, 50);
        assert!((kl.coefficient() - 0.1 * 1.1 * 0.9).abs() < 1e-12);
        let mut fixed = KlController::new(&KlConfig { target: None, ..config });
        fixed.observe(600.0, 50);
        assert_eq!(fixed.coefficient(), 0.1);
    }
}
