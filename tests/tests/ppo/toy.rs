//! A world small enough to know the answer: 16 tokens, a uniform start, responses of at most 10 tokens.

use candle_core::Tensor;
use tandem_engine::generate::{Completion, Finish, SamplingKey};
use tandem_engine::model::spec::{Family, ModelSpec, NormKind, PositionKind};
use tandem_engine::model::unit::{HEAD, Head};
use tandem_engine::train::{OptimizerConfig, OptimizerKind, Schedule, ScheduleKind};
use tandem_engine::{Engine, Model, Recompute, Train};
use tandem_kernels::mlp::Activation;
use tandem_kernels::sample::SamplingParams;
use tandem_stages::ppo::advantage::{RewardShape, gae};
use tandem_stages::ppo::rollout::{self, RolloutConfig, Sequence};
use tandem_stages::ppo::update::{Learners, Lesson, UpdateConfig, UpdateOutcome, update};
use tandem_stages::ranks::Team;

pub(crate) const VOCABULARY: usize = 16;
pub(crate) const EOS: u32 = 0;
/// The token that the first task pays for.
pub(crate) const A: u32 = 3;
pub(crate) const MAX_RESPONSE: usize = 10;
/// Pay of the tasks, and the price of a nat.
pub(crate) const C: f64 = 3.0;
pub(crate) const BETA: f64 = 0.1;
const PROMPTS: usize = 240;
const EPOCHS: usize = 2;
const MINI_BATCHES: usize = 2;

/// What a test changes about the procedure; the product has no such switches.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Variant {
    Correct,
    /// Rollouts take the most probable token.
    Greedy,
    /// The token that ends a response is left out of the losses.
    EndMasked,
}

/// Means over the responses of one iteration.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Iteration {
    /// `score − β · KL` to the initial policy.
    pub(crate) objective: f64,
    /// Its standard error.
    pub(crate) standard_error: f64,
    pub(crate) fraction_a: f64,
    pub(crate) eos_rate: f64,
    /// Largest ratio of new to old probability in the first update.
    pub(crate) first_ratio_max: f64,
}

pub(crate) fn spec() -> ModelSpec {
    ModelSpec {
        family: Family::Llama,
        vocab_size: VOCABULARY,
        hidden: 64,
        layers: 2,
        heads: 4,
        kv_heads: 4,
        head_dim: 16,
        mlp_width: 176,
        activation: Activation::Silu,
        gated: true,
        norm: NormKind::Rms,
        norm_eps: 1e-5,
        post_norm: false,
        positions: PositionKind::Rotary { theta: 10_000.0, scaling: None },
        max_positions: 32,
        qkv_bias: false,
        output_bias: false,
        mlp_bias: false,
        window: None,
        tied: false,
        embedding_width: None,
        init_std: 0.1,
        dropout: 0.0,
    }
}

/// A random model whose head is zero: its policy is exactly uniform.
pub(crate) fn uniform_policy(seed: u64) -> Model {
    let model = Model::initial(spec(), Head::Language, seed).unwrap();
    model.units().unwrap()[0].get(HEAD).unwrap().zero_set().unwrap();
    model
}

pub(crate) fn optimizer(lr: f64) -> OptimizerConfig {
    OptimizerConfig {
        kind: OptimizerKind::AdamW,
        schedule: Schedule {
            kind: ScheduleKind::Constant,
            peak_lr: lr,
            warmup_steps: 0,
            total_steps: 1,
            min_ratio: 1.0,
        },
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.0,
        max_grad_norm: 1.0,
    }
}

pub(crate) fn update_config() -> UpdateConfig {
    UpdateConfig {
        policy_clip: 0.2,
        value_clip: 0.5,
        entropy_coefficient: 0.0,
        whiten: true,
        tokens_per_micro_batch: 4096,
        recompute: Recompute::Off,
    }
}

/// Actor, critic and reference of a toy run.
pub(crate) struct Toy {
    pub(crate) actor: Engine<Train>,
    pub(crate) critic: Engine<Train>,
    pub(crate) reference: Model,
    pub(crate) seed: u64,
    pub(crate) variant: Variant,
    score: fn(&Completion) -> f64,
}

/// Pays for every [`A`], as a share of the longest response.
pub(crate) fn count_a(completion: &Completion) -> f64 {
    C * completion.ids.iter().filter(|&&id| id == A).count() as f64 / MAX_RESPONSE as f64
}

/// Pays for ending.
pub(crate) fn ends(completion: &Completion) -> f64 {
    if completion.finish == Finish::Stop { C } else { 0.0 }
}

impl Toy {
    pub(crate) fn new(seed: u64, variant: Variant, score: fn(&Completion) -> f64) -> Self {
        let policy = uniform_policy(seed);
        Self {
            reference: policy.duplicate().unwrap(),
            actor: Engine::new(policy, optimizer(1e-3)).unwrap(),
            critic: Engine::new(Model::initial(spec(), Head::Scalar, seed + 100).unwrap(), optimizer(2e-3)).unwrap(),
            seed,
            variant,
            score,
        }
    }

    /// Responses of iteration `step`, and what they teach.
    pub(crate) fn explore(mut self, step: u64) -> (Self, Vec<Completion>, Vec<Lesson>) {
        let prompts: Vec<Vec<u32>> = (0..PROMPTS as u32).map(|i| vec![1 + i % 15, 1 + (i / 15) % 15]).collect();
        let ids: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        let sampling = match self.variant {
            Variant::Greedy => SamplingParams::greedy(),
            _ => SamplingParams::default(),
        };
        let config = RolloutConfig {
            sampling,
            max_response_tokens: MAX_RESPONSE,
            stop: vec![EOS],
            slots: 64,
            prefill_tokens: 1024,
        };
        let key = SamplingKey { seed: self.seed, step };
        let (actor, completions, _) =
            rollout::sample(self.actor, &ids, 1, step * PROMPTS as u64, key, &config).unwrap();
        self.actor = actor;
        let sequences: Vec<Sequence<'_>> = completions
            .iter()
            .map(|c| Sequence { sample: c.sample, prompt: ids[c.request], response: &c.ids })
            .collect();
        let reference = rollout::log_probs(&Team::solo(), &self.reference, &sequences, 4096).unwrap();
        let values = rollout::values(&Team::solo(), self.critic.model(), &sequences, 4096).unwrap();
        let shape = RewardShape { kl_coefficient: BETA, score_clip: None, missing_eos_penalty: 0.0 };
        let lessons = completions.iter().zip(reference).zip(values).map(|((c, reference), old_values)| {
            let rewards = shape.token_rewards(&c.logp, &reference, (self.score)(c) as f32, true);
            let (advantages, returns) = gae(&rewards, &old_values, 1.0, 0.95);
            let mut lesson = Lesson {
                sample: c.sample,
                prompt: prompts[c.request].clone(),
                response: c.ids.clone(),
                old_logp: c.logp.clone(),
                old_values,
                advantages,
                returns,
            };
            if self.variant == Variant::EndMasked && c.finish == Finish::Stop {
                let kept = c.ids.len() - 1;
                lesson.response.truncate(kept);
                for list in [&mut lesson.old_logp, &mut lesson.old_values, &mut lesson.advantages, &mut lesson.returns]
                {
                    list.truncate(kept);
                }
            }
            lesson
        });
        let lessons = lessons.filter(|lesson| !lesson.response.is_empty()).collect();
        (self, completions, lessons)
    }

    /// One update on some lessons.
    pub(crate) fn learn(&mut self, lessons: &[&Lesson], config: &UpdateConfig) -> UpdateOutcome {
        update(&Team::solo(), &mut self.actor, &mut self.critic, lessons, Learners::Both, config).unwrap()
    }

    /// One whole iteration.
    pub(crate) fn iterate(self, step: u64) -> (Self, Iteration) {
        let (mut toy, completions, lessons) = self.explore(step);
        let mut iteration = toy.figures(&completions);
        for epoch in 0..EPOCHS as u64 {
            let order = tandem_data::order::permutation(toy.seed, step * EPOCHS as u64 + epoch, lessons.len());
            for (part, chunk) in order.chunks(lessons.len().div_ceil(MINI_BATCHES)).enumerate() {
                let members: Vec<&Lesson> = chunk.iter().map(|&index| &lessons[index]).collect();
                let outcome = toy.learn(&members, &update_config());
                if epoch == 0 && part == 0 {
                    iteration.first_ratio_max = outcome.policy.ratio_max;
                }
            }
        }
        (toy, iteration)
    }

    /// Runs `iterations` iterations.
    pub(crate) fn run(self, iterations: u64) -> Vec<Iteration> {
        let mut toy = self;
        let mut all = Vec::new();
        for step in 0..iterations {
            let (next, iteration) = toy.iterate(step);
            toy = next;
            all.push(iteration);
        }
        all
    }

    fn figures(&self, completions: &[Completion]) -> Iteration {
        let uniform = (VOCABULARY as f64).ln();
        let count = completions.len() as f64;
        let mean = |of: &dyn Fn(&Completion) -> f64| completions.iter().map(of).sum::<f64>() / count;
        // The reference is uniform, so KL is Σ (logp + ln 16).
        let objective_of =
            |c: &Completion| (self.score)(c) - BETA * c.logp.iter().map(|&logp| f64::from(logp) + uniform).sum::<f64>();
        let objective = mean(&objective_of);
        let variance = mean(&|c| (objective_of(c) - objective).powi(2));
        let length = mean(&|c| c.ids.len() as f64);
        Iteration {
            objective,
            standard_error: (variance / count).sqrt(),
            fraction_a: mean(&|c| c.ids.iter().filter(|&&id| id == A).count() as f64) / length,
            eos_rate: mean(&|c| f64::from(u8::from(c.finish == Finish::Stop))),
            first_ratio_max: 0.0,
        }
    }
}

/// The largest `E[score − β KL]` that any policy reaches, by soft dynamic programming from the last token back:
/// `v_t = β ln Σ_a p_0(a) exp((r_a + v_{t+1}) / β)`, with nothing to come after the end.
pub(crate) fn optimum(pay_for_a: f64, pay_for_end: f64) -> f64 {
    let uniform = 1.0 / VOCABULARY as f64;
    let mut to_come = 0.0;
    for _ in 0..MAX_RESPONSE {
        let others = (VOCABULARY - 2) as f64 * (to_come / BETA).exp();
        let a = ((pay_for_a + to_come) / BETA).exp();
        let end = (pay_for_end / BETA).exp();
        to_come = BETA * (uniform * (others + a + end)).ln();
    }
    to_come
}

/// All elements of a tensor.
pub(crate) fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}
