//! Twin of attention: one head of one sequence, with the whole matrix of probabilities.

/// A matrix, row by row.
pub type Rows = Vec<Vec<f64>>;

/// Output `[n, D]` and log-sum-exp `[n]` of `q`, `k`, `v` (each `n` rows of `D`); `visible(i, j)` is the mask.
pub fn attention(
    q: &[Vec<f64>],
    k: &[Vec<f64>],
    v: &[Vec<f64>],
    scale: f64,
    visible: impl Fn(usize, usize) -> bool,
) -> (Rows, Vec<f64>) {
    let (mut o, mut lse) = (Vec::new(), Vec::new());
    for (i, q) in q.iter().enumerate() {
        let score = |j: usize| scale * q.iter().zip(&k[j]).map(|(q, k)| q * k).sum::<f64>();
        let keys: Vec<usize> = (0..k.len()).filter(|&j| visible(i, j)).collect();
        let maximum = keys.iter().map(|&j| score(j)).fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = keys.iter().map(|&j| (score(j) - maximum).exp()).sum();
        let mut row = vec![0.0; v[0].len()];
        for &j in &keys {
            let p = (score(j) - maximum).exp() / total;
            row.iter_mut().zip(&v[j]).for_each(|(o, v)| *o += p * v);
        }
        o.push(row);
        lse.push(maximum + total.ln());
    }
    (o, lse)
}

/// Gradients `(dq, dk, dv)` of [`attention`] for the output gradient `d_o`.
pub fn attention_backward(
    d_o: &[Vec<f64>],
    q: &[Vec<f64>],
    k: &[Vec<f64>],
    v: &[Vec<f64>],
    scale: f64,
    visible: impl Fn(usize, usize) -> bool,
) -> (Rows, Rows, Rows) {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let add =
        |into: &mut [f64], factor: f64, from: &[f64]| into.iter_mut().zip(from).for_each(|(i, f)| *i += factor * f);
    let (o, lse) = attention(q, k, v, scale, &visible);
    let zeros = |like: &[Vec<f64>]| like.iter().map(|row| vec![0.0; row.len()]).collect::<Vec<_>>();
    let (mut dq, mut dk, mut dv) = (zeros(q), zeros(k), zeros(v));
    for i in 0..q.len() {
        for j in (0..k.len()).filter(|&j| visible(i, j)) {
            let p = (scale * dot(&q[i], &k[j]) - lse[i]).exp();
            let ds = scale * p * (dot(&d_o[i], &v[j]) - dot(&d_o[i], &o[i]));
            add(&mut dv[j], p, &d_o[i]);
            add(&mut dq[i], ds, &k[j]);
            add(&mut dk[j], ds, &q[i]);
        }
    }
    (dq, dk, dv)
}
