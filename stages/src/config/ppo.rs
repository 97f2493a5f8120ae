//! `[ppo]`: proximal policy optimisation (Schulman et al., 2017) of a language model.

use serde::{Deserialize, Serialize};
use tandem_engine::WeightFormat;

use super::check::Checker;
use super::generation::SamplingConfig;
use super::optimizer::OptimizerConfig;
use super::scoring::RewardSourceConfig;
use super::training::check_keep_last;

/// `[ppo]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PpoConfig {
    /// The model to be trained, which is also the reference; left out: the SFT model of the same pipeline, or else `[model]`.
    pub actor: Option<String>,
    /// The model whose weights the critic starts from; left out: the reward model if there is one, else the actor.
    pub critic: Option<String>,
    /// Rollouts, each followed by its updates.
    pub iterations: u64,
    /// Prompts of one rollout.
    pub prompts_per_iteration: usize,
    /// Responses sampled for each prompt.
    pub samples_per_prompt: usize,
    /// Passes over a rollout.
    pub epochs: usize,
    /// Optimizer steps in one pass.
    pub mini_batches: usize,
    /// Most tokens in one forward pass. Changes memory and speed, not results.
    pub tokens_per_micro_batch: usize,
    /// Compute activations again in the backward pass instead of keeping them: less memory, a third more work.
    pub recompute: bool,
    /// Longest prompt in tokens; longer ones are treated as `data.over_long` says.
    pub max_prompt_tokens: usize,
    /// Longest response in tokens, the end token included.
    pub max_response_tokens: usize,
    /// Most tokens of prompt and response together; left out: the sum of their two limits, which it must not be below.
    pub max_out_tokens: Option<usize>,
    /// Ranks that share a copy of the actor while it generates.
    pub inference_tp_size: usize,
    /// Whether the memory of the key-value cache is given back after each rollout; otherwise it is kept for the next one.
    pub release_inference_cache: bool,
    /// Whether the copy of the actor that generates is kept while training, and only its values are renewed: faster
    /// switches, more memory.
    pub pin_parameters: bool,
    /// What the linear maps of the copy of the actor that generates are kept in: `"precision"`, that of the run, or `"int8"`, 8
    /// bits with a scale for each row (with `run.precision = "bf16"`). What then samples is not quite the actor: the
    /// log-probabilities that are learnt from are computed again, by the actor as it is trained, and `logp_gap` reports how far
    /// off the recorded ones are.
    pub rollout_weights: WeightFormat,
    /// Units that are exchanged together when the actor is laid out for generation.
    pub tp_gather_partition_size: usize,
    /// Prompts are the first words of the rows' texts, this many; left out: the rows' prompts.
    pub opening_words: Option<usize>,
    /// `[ppo.sampling]`: how responses are sampled. Log-probabilities are always those of the model itself.
    pub sampling: SamplingConfig,
    /// Discount per token.
    pub gamma: f64,
    /// Trade of bias against variance in the advantages (GAE; Schulman et al., 2016).
    pub lambda: f64,
    /// How far the ratio of new to old probability may move before its gradient is cut.
    pub policy_clip: f64,
    /// How far a value may move from its old one before its gradient is cut.
    pub value_clip: f64,
    /// Whether advantages are brought to mean 0 and standard deviation 1 over the mini-batch.
    pub whiten: bool,
    /// Weight of the entropy of the policy, as a bonus.
    pub entropy_coefficient: f64,
    /// Subtracted from the score of a response that does not end by itself.
    pub missing_eos_penalty: f64,
    /// Iterations in which only the critic is trained.
    pub critic_warmup_iterations: u64,
    /// Leave out the rest of an iteration's updates once the approximate KL divergence from the rollout's policy exceeds this.
    pub max_approx_kl: Option<f64>,
    /// Decay per optimizer step of an averaged actor, which is then the one that is judged and exported; left out: none is
    /// kept.
    pub ema_decay: Option<f64>,
    /// `[ppo.kl]`: what deviating from the reference costs.
    pub kl: KlConfig,
    /// `[ppo.reward]`: what responses are worth.
    pub reward: RewardSourceConfig,
    /// `[ppo.actor_optimizer]`.
    pub actor_optimizer: OptimizerConfig,
    /// `[ppo.critic_optimizer]`.
    pub critic_optimizer: OptimizerConfig,
    /// Iterations between evaluations; 0: only at the start and the end.
    pub eval_every: u64,
    /// Iterations between checkpoints; 0: only at the end and when stopped.
    pub checkpoint_every: u64,
    /// How many checkpoints are kept, at least 2.
    pub keep_last: usize,
}

/// `[ppo.kl]`. The penalty `−coefficient · (log π(a) − log π_ref(a))` is part of each token's reward.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KlConfig {
    /// The penalty per nat; with a target, only the first one.
    pub coefficient: f64,
    /// Nats per response to be held by adapting the coefficient (Ziegler et al., 2019, section 2.2); left out: it is fixed.
    pub target: Option<f64>,
    /// Responses over which the adaptation is spread.
    pub horizon: f64,
}

impl Default for KlConfig {
    fn default() -> Self {
        Self { coefficient: 0.05, target: None, horizon: 10_000.0 }
    }
}

impl Default for PpoConfig {
    fn default() -> Self {
        Self {
            actor: None,
            critic: None,
            iterations: 100,
            prompts_per_iteration: 64,
            samples_per_prompt: 1,
            epochs: 2,
            mini_batches: 2,
            tokens_per_micro_batch: 4096,
            recompute: false,
            max_prompt_tokens: 256,
            max_response_tokens: 256,
            max_out_tokens: None,
            inference_tp_size: 1,
            release_inference_cache: true,
            pin_parameters: false,
            rollout_weights: WeightFormat::Precision,
            tp_gather_partition_size: 8,
            opening_words: None,
            sampling: SamplingConfig::default(),
            gamma: 1.0,
            lambda: 0.95,
            policy_clip: 0.2,
            value_clip: 0.2,
            whiten: true,
            entropy_coefficient: 0.0,
            missing_eos_penalty: 0.0,
            critic_warmup_iterations: 0,
            max_approx_kl: None,
            ema_decay: None,
            kl: KlConfig::default(),
            reward: RewardSourceConfig::default(),
            actor_optimizer: OptimizerConfig::constant(1e-6),
            critic_optimizer: OptimizerConfig::constant(5e-6),
            eval_every: 0,
            checkpoint_every: 10,
            keep_last: 2,
        }
    }
}

impl PpoConfig {
    /// Responses of one rollout.
    pub fn samples_per_iteration(&self) -> usize {
        self.prompts_per_iteration * self.samples_per_prompt
    }

    /// Most tokens of a prompt and its response.
    pub fn longest_sequence(&self) -> usize {
        self.max_prompt_tokens + self.max_response_tokens
    }

    /// Optimizer steps in all, if none is left out.
    pub fn steps(&self) -> u64 {
        self.iterations * (self.epochs * self.mini_batches) as u64
    }

    pub(super) fn check(&self, check: &mut Checker) {
        check.at_least("ppo.iterations", self.iterations, 1);
        check.at_least("ppo.prompts_per_iteration", self.prompts_per_iteration, 1);
        check.at_least("ppo.samples_per_prompt", self.samples_per_prompt, 1);
        check.at_least("ppo.epochs", self.epochs, 1);
        check.at_least("ppo.mini_batches", self.mini_batches, 1);
        let samples = self.prompts_per_iteration.saturating_mul(self.samples_per_prompt);
        if self.mini_batches > samples {
            check.fail(
                "ppo.mini_batches",
                format_args!("is {}, more than the {samples} samples of an iteration", self.mini_batches),
            );
        }
        check.at_least("ppo.max_prompt_tokens", self.max_prompt_tokens, 1);
        check.at_least("ppo.max_response_tokens", self.max_response_tokens, 1);
        let longest = self.max_prompt_tokens.saturating_add(self.max_response_tokens);
        if self.tokens_per_micro_batch < longest {
            check.fail(
                "ppo.tokens_per_micro_batch",
                format_args!(
                    "is {}; it must hold one prompt and response, max_prompt_tokens + max_response_tokens = {longest}",
                    self.tokens_per_micro_batch
                ),
            );
        }
        if let Some(most) = self.max_out_tokens
            && most < longest
        {
            check.fail(
                "ppo.max_out_tokens",
                format_args!(
                    "is {most}, less than max_prompt_tokens + max_response_tokens = {longest}; raise it or lower these"
                ),
            );
        }
        check.at_least("ppo.inference_tp_size", self.inference_tp_size, 1);
        check.at_least("ppo.tp_gather_partition_size", self.tp_gather_partition_size, 1);
        check.optional_count("ppo.opening_words", self.opening_words);
        self.sampling.check("ppo.sampling", check);
        if self.sampling.temperature == 0.0 {
            check.fail("ppo.sampling.temperature", "is 0: greedy rollouts explore nothing; use 1");
        }
        check.positive_fraction("ppo.gamma", self.gamma);
        check.fraction("ppo.lambda", self.lambda);
        check.positive("ppo.policy_clip", self.policy_clip);
        check.positive("ppo.value_clip", self.value_clip);
        check.not_negative("ppo.entropy_coefficient", self.entropy_coefficient);
        check.not_negative("ppo.missing_eos_penalty", self.missing_eos_penalty);
        for (key, value) in [("ppo.max_approx_kl", self.max_approx_kl), ("ppo.kl.target", self.kl.target)] {
            if let Some(value) = value {
                check.positive(key, value);
            }
        }
        if let Some(decay) = self.ema_decay {
            check.below_one("ppo.ema_decay", decay);
        }
        check.not_negative("ppo.kl.coefficient", self.kl.coefficient);
        check.positive("ppo.kl.horizon", self.kl.horizon);
        self.reward.check(check);
        self.actor_optimizer.check("ppo.actor_optimizer", check);
        self.critic_optimizer.check("ppo.critic_optimizer", check);
        check_keep_last("ppo.keep_last", self.keep_last, check);
    }
}
