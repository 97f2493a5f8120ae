//! The optimizers as their papers write them: all ranks in one place, element by element, without bits, blocks or threads.

use tandem_engine::train::{OptimizerConfig, OptimizerKind};
use tandem_kernels::Isa;

/// One unit of the model on all ranks.
pub(crate) struct Twin {
    config: OptimizerConfig,
    ranks: usize,
    step: u64,
    /// Which elements are decayed.
    decays: Vec<bool>,
    /// By rank.
    pub(crate) weights: Vec<Vec<f32>>,
    momenta: Vec<Vec<f32>>,
    variance: Vec<f32>,
    errors: Errors,
    left_out: Vec<Vec<f32>>,
    /// What 0/1 Adam counts as DeepSpeed does: steps between exact sums and how many there have been, steps between exchanges
    /// and how many there have been.
    variance_interval: u64,
    variance_count: u64,
    local_interval: u64,
    local_count: u64,
    anchor: Vec<f32>,
    moved: Vec<Vec<f32>>,
    keep: f64,
    lr_sum: f64,
}

struct Errors {
    worker: Vec<Vec<f32>>,
    server: Vec<Vec<f32>>,
}

/// `a * b + c`, rounded as the kernels of this machine round it.
fn fma(a: f32, b: f32, c: f32) -> f32 {
    if Isa::detect() >= Isa::Avx2 || cfg!(target_arch = "aarch64") { a.mul_add(b, c) } else { a * b + c }
}

fn sign(x: f32) -> f32 {
    if x >= 0.0 { 1.0 } else { -1.0 }
}

/// A sum in f64 in eight lanes: the order that the engine promises.
fn sum(x: &[f32], of: impl Fn(f64) -> f64) -> f64 {
    let lane = |lane: usize| x.iter().skip(lane).step_by(8).fold(0.0, |sum, &x| sum + of(f64::from(x)));
    (0..8).map(lane).fold(0.0, |sum, lane| sum + lane)
}

/// The tree in which ranks are added.
pub(crate) fn tree(values: &[f32]) -> f32 {
    match values.len() {
        1 => values[0],
        len => {
            let half = len.next_power_of_two() / 2;
            tree(&values[..half]) + tree(&values[half..])
        }
    }
}

impl Errors {
    fn new(len: usize, ranks: usize) -> Self {
        let mut multiple = 8 * ranks;
        while !multiple.is_multiple_of(ranks * ranks) {
            multiple += 8 * ranks;
        }
        let padded = len.next_multiple_of(multiple);
        Self { worker: vec![vec![0.0; padded]; ranks], server: vec![vec![0.0; padded / ranks]; ranks] }
    }

    fn reset(&mut self) {
        self.worker.iter_mut().chain(&mut self.server).for_each(|errors| errors.fill(0.0));
    }

    /// `compressed_allreduce` of DeepSpeed.
    fn mean(&mut self, brought: &[Vec<f32>]) -> Vec<f32> {
        let (ranks, padded, chunk) = (brought.len(), self.worker[0].len(), self.server[0].len());
        let mut told = vec![vec![0.0; padded]; ranks];
        for rank in 0..ranks {
            let brought = |i: usize| brought[rank].get(i).copied().unwrap_or(0.0);
            let x: Vec<f32> = (0..padded).map(|i| self.worker[rank][i] + brought(i)).collect();
            let scale = (sum(&x, |x| x * x) / padded as f64).sqrt() as f32;
            for i in 0..padded {
                told[rank][i] = scale * sign(x[i]);
                self.worker[rank][i] = x[i] - told[rank][i];
            }
        }
        let mut result = Vec::new();
        for server in 0..ranks {
            let column = |i: usize| told.iter().map(|told| told[server * chunk + i]).collect::<Vec<_>>();
            let y: Vec<f32> = (0..chunk).map(|i| self.server[server][i] + tree(&column(i)) / ranks as f32).collect();
            let scale = (sum(&y, |y| y * y) / chunk as f64).sqrt() as f32;
            for i in 0..chunk {
                result.push(scale * sign(y[i]));
                self.server[server][i] = y[i] - scale * sign(y[i]);
            }
        }
        result.truncate(brought[0].len());
        result
    }
}

impl Twin {
    pub(crate) fn new(config: OptimizerConfig, ranks: usize, weights: &[f32], decays: Vec<bool>) -> Self {
        let zeros = || vec![vec![0.0; weights.len()]; ranks];
        Self {
            config,
            ranks,
            step: 0,
            decays,
            weights: vec![weights.to_vec(); ranks],
            momenta: zeros(),
            variance: vec![0.0; weights.len()],
            errors: Errors::new(weights.len(), ranks),
            left_out: zeros(),
            variance_interval: 1,
            variance_count: 0,
            local_interval: 1,
            local_count: 0,
            anchor: Vec::new(),
            moved: zeros(),
            keep: 1.0,
            lr_sum: 0.0,
        }
    }

    /// Whether the gradients of the next step are added up over the ranks.
    pub(crate) fn adds_up(&self) -> bool {
        match self.config.kind {
            OptimizerKind::AdamW => true,
            OptimizerKind::OneBitAdam { freeze_steps } => self.step < freeze_steps,
            OptimizerKind::ZeroOneAdam { freeze_steps, .. } => {
                self.step < freeze_steps && (self.step + 1).is_multiple_of(self.variance_interval)
            }
            OptimizerKind::SignSgd { .. } => false,
        }
    }

    /// One step; `grads` are sums over a part of `terms` terms, by rank, or over all of them.
    pub(crate) fn step(&mut self, grads: &[Vec<f32>], terms: f64, norm: f64) {
        let limit = self.config.max_grad_norm;
        let clip = if norm > limit { limit / norm } else { 1.0 };
        let parts = if self.adds_up() { 1 } else { self.ranks };
        let scale = (clip * parts as f64 / terms) as f32;
        let means: Vec<Vec<f32>> = grads.iter().map(|grad| grad.iter().map(|g| g * scale).collect()).collect();
        self.step += 1;
        match self.config.kind {
            OptimizerKind::AdamW => unreachable!("AdamW has twins of its own"),
            OptimizerKind::OneBitAdam { freeze_steps } => self.one_bit(&means, freeze_steps),
            OptimizerKind::ZeroOneAdam { freeze_steps, .. } if self.step <= freeze_steps => self.together(&means),
            OptimizerKind::ZeroOneAdam { .. } => self.apart(&means),
            OptimizerKind::SignSgd { error_feedback } => self.vote(&means, error_feedback),
        }
    }

    fn lr(&self) -> f64 {
        self.config.schedule.lr(self.step)
    }

    fn update_momenta(&mut self, means: &[Vec<f32>]) {
        for (momentum, mean) in self.momenta.iter_mut().zip(means) {
            for (m, g) in momentum.iter_mut().zip(mean) {
                *m = fma((1.0 - self.config.beta1) as f32, g - *m, *m);
            }
        }
    }

    fn update_variance(&mut self, mean: &[f32]) {
        let beta2 = self.config.beta2;
        for (v, g) in self.variance.iter_mut().zip(mean) {
            *v = fma(beta2 as f32, *v, (1.0 - beta2) as f32 * g * g);
        }
    }

    fn quotient(&self, x: f32, i: usize) -> f32 {
        x / (self.variance[i].sqrt() + self.config.eps as f32)
    }

    fn masked(&self, mut values: Vec<f32>) -> Vec<f32> {
        values.iter_mut().zip(&self.variance).filter(|(_, v)| **v == 0.0).for_each(|(value, _)| *value = 0.0);
        values
    }

    /// `p ← p · keep − lr · direction`.
    fn move_by(&mut self, direction: impl Fn(&Self, usize, usize) -> f32) {
        let lr = self.lr();
        for rank in 0..self.ranks {
            for i in 0..self.decays.len() {
                let decay = if self.decays[i] { self.config.weight_decay } else { 0.0 };
                let keep = (1.0 - lr * decay) as f32;
                self.weights[rank][i] = fma(-lr as f32, direction(self, rank, i), self.weights[rank][i] * keep);
            }
        }
    }

    fn adam(&mut self) {
        self.move_by(|twin, rank, i| twin.quotient(twin.momenta[rank][i], i));
    }

    fn one_bit(&mut self, means: &[Vec<f32>], freeze_steps: u64) {
        self.update_momenta(means);
        if self.step <= freeze_steps {
            self.update_variance(&means[0]);
        } else {
            let mean = self.errors.mean(&self.momenta);
            self.momenta = vec![self.masked(mean); self.ranks];
        }
        self.adam();
    }

    fn together(&mut self, means: &[Vec<f32>]) {
        let OptimizerKind::ZeroOneAdam { variance_updates_per_interval, .. } = self.config.kind else { return };
        if self.step.is_multiple_of(self.variance_interval) {
            self.update_momenta(means);
            self.update_variance(&means[0]);
            self.variance_count += 1;
            if self.variance_count == variance_updates_per_interval {
                (self.variance_count, self.variance_interval) = (0, 2 * self.variance_interval);
            }
        } else {
            let mean = self.errors.mean(means);
            self.update_momenta(&vec![self.masked(mean); self.ranks]);
        }
        self.adam();
    }

    fn apart(&mut self, means: &[Vec<f32>]) {
        let OptimizerKind::ZeroOneAdam { freeze_steps, steps_per_local_interval, max_local_steps, .. } =
            self.config.kind
        else {
            return;
        };
        if self.step == freeze_steps + 1 {
            self.errors.reset();
            self.anchor = self.weights[0].clone();
        }
        self.update_momenta(means);
        let lr = self.lr();
        self.lr_sum += lr;
        self.keep *= 1.0 - lr * self.config.weight_decay;
        for rank in 0..self.ranks {
            self.momenta[rank] = self.masked(self.momenta[rank].clone());
            for i in 0..self.decays.len() {
                self.moved[rank][i] = fma(-lr as f32, self.quotient(self.momenta[rank][i], i), self.moved[rank][i]);
            }
        }
        let joins = self.step.is_multiple_of(self.local_interval);
        if joins && self.lr_sum > 0.0 {
            let root = |i: usize| self.variance[i].sqrt() + self.config.eps as f32;
            let brought: Vec<Vec<f32>> =
                self.moved.iter().map(|a| a.iter().enumerate().map(|(i, a)| a * root(i)).collect()).collect();
            let mean = self.errors.mean(&brought);
            let mean = self.masked(mean);
            let momentum: Vec<f32> = mean.iter().map(|a| a * (-1.0 / self.lr_sum) as f32).collect();
            self.momenta = vec![momentum; self.ranks];
            self.moved = vec![mean.iter().enumerate().map(|(i, &a)| self.quotient(a, i)).collect(); self.ranks];
        }
        for rank in 0..self.ranks {
            for i in 0..self.decays.len() {
                let keep = if self.decays[i] { self.keep as f32 } else { 1.0 };
                self.weights[rank][i] = self.anchor[i] * keep + self.moved[rank][i];
            }
        }
        if joins {
            self.anchor = self.weights[0].clone();
            self.moved.iter_mut().for_each(|moved| moved.fill(0.0));
            (self.keep, self.lr_sum) = (1.0, 0.0);
        }
        self.local_count += 1;
        if self.local_count == steps_per_local_interval {
            (self.local_count, self.local_interval) = (0, max_local_steps.min(2 * self.local_interval));
        }
    }

    fn vote(&mut self, means: &[Vec<f32>], error_feedback: bool) {
        self.update_momenta(means);
        let mut votes = self.momenta.clone();
        if error_feedback {
            for (vote, left_out) in votes.iter_mut().zip(&mut self.left_out) {
                vote.iter_mut().zip(left_out.iter()).for_each(|(vote, left_out)| *vote += left_out);
                let scale = (sum(vote, f64::abs) / vote.len() as f64) as f32;
                for (left_out, &vote) in left_out.iter_mut().zip(vote.iter()) {
                    let zero = if self.step.is_multiple_of(2) { -1.0 } else { 1.0 };
                    *left_out = vote - scale * if vote == 0.0 { zero } else { sign(vote) };
                }
            }
        }
        let is_odd = !self.step.is_multiple_of(2);
        self.move_by(|_, _, i| {
            let count = |of: fn(f32) -> bool| votes.iter().filter(|vote| of(vote[i])).count();
            let (above, below, zero) = (count(|x| x > 0.0), count(|x| x < 0.0), count(|x| x == 0.0));
            // Zeros and ties are for `+` in odd steps, for `−` in even ones.
            let is_up = if is_odd { above + zero >= below } else { above > below + zero };
            if is_up { 1.0 } else { -1.0 }
        });
    }
}
