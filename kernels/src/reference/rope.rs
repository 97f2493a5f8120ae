//! Twin of the rotary embedding.

/// Rotates the first `rotary_dim` coordinates of one head by `position · theta^(-2i / rotary_dim)`.
pub fn rope(head: &[f64], rotary_dim: usize, theta: f64, position: f64) -> Vec<f64> {
    let half = rotary_dim / 2;
    let mut out = head.to_vec();
    for i in 0..half {
        let (sin, cos) = (position * theta.powf(-2.0 * i as f64 / rotary_dim as f64)).sin_cos();
        out[i] = head[i] * cos - head[i + half] * sin;
        out[i + half] = head[i + half] * cos + head[i] * sin;
    }
    out
}
