//! Linear layers.

/// `y = x·Wᵀ + bias` and the sum of the magnitudes of what is added: `x [t, k]`, `w [n, k]`, `bias [n]` → `[t, n]` each.
pub fn linear(x: &[f64], w: &[f64], bias: Option<&[f64]>, k: usize) -> [Vec<f64>; 2] {
    let (mut sums, mut magnitudes) = (Vec::new(), Vec::new());
    for x in x.chunks(k) {
        for (j, w) in w.chunks(k).enumerate() {
            let start = bias.map_or(0.0, |bias| bias[j]);
            let terms = || x.iter().zip(w).map(|(x, w)| x * w);
            sums.push(terms().sum::<f64>() + start);
            magnitudes.push(terms().map(f64::abs).sum::<f64>() + start.abs());
        }
    }
    [sums, magnitudes]
}

/// Rows of `k` weights in 8 bits: the scale of each row, its largest magnitude through 127 rounded up to 17 bits of
/// significand, and the nearest multiples of it.
pub fn int8(w: &[f64], k: usize) -> (Vec<f64>, Vec<f64>) {
    let (mut scales, mut multiples) = (Vec::new(), Vec::new());
    for row in w.chunks(k) {
        let scale = row.iter().fold(0.0, |most: f64, value| most.max(value.abs())) / 127.0;
        let scale = if scale == 0.0 { 0.0 } else { rounded_up(scale) };
        scales.push(scale);
        multiples.extend(row.iter().map(|w| if scale == 0.0 { 0.0 } else { (w / scale).round_ties_even() * scale }));
    }
    (scales, multiples)
}

/// The least number of 17 bits of significand that is not below `value`.
fn rounded_up(value: f64) -> f64 {
    let unit = 2f64.powi(value.log2().floor() as i32 - 16);
    (value / unit).ceil() * unit
}
