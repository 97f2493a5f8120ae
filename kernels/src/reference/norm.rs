//! Twins of the norms, one row at a time.

/// `w · x / sqrt(mean(x²) + eps)`.
pub fn rms_norm(x: &[f64], w: &[f64], eps: f64) -> Vec<f64> {
    let mean_square = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    x.iter().zip(w).map(|(x, w)| w * x / (mean_square + eps).sqrt()).collect()
}

/// `w · (x - mean) / sqrt(var + eps) + b`.
pub fn layer_norm(x: &[f64], w: &[f64], b: &[f64], eps: f64) -> Vec<f64> {
    let mean = x.iter().sum::<f64>() / x.len() as f64;
    let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / x.len() as f64;
    x.iter().zip(w).zip(b).map(|((x, w), b)| w * (x - mean) / (variance + eps).sqrt() + b).collect()
}
