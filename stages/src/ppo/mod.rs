//! Proximal policy optimisation (Schulman et al. 2017) of a language model against a reward (Ziegler et al. 2019).
//!
//! An iteration samples responses, measures them, commits the experience, reads it back and learns from it for a few
//! epochs of mini-batches. The whole loop is [`run`].

pub mod advantage;
mod experience;
pub mod kl;
pub mod loss;
pub mod report;
pub mod rollout;
mod state;
pub mod update;

use std::path::Path;
use std::time::Instant;

use tandem_collective::Tag;
use tandem_data::order::permutation;
use tandem_engine::model::Blueprint;
use tandem_engine::model::spec::ModelSpec;
use tandem_engine::model::unit::Head;
use tandem_engine::train::Ema;
use tandem_engine::{Engine, Recompute, SwitchConfig};

use self::advantage::RewardShape;
use self::experience::{Explorer, Figures, Gap, Rollout, Times};
use self::kl::KlController;
use self::rollout::RolloutConfig;
use self::state::{Learner, PpoState, Totals};
use self::update::{Learners, Lesson, UpdateConfig, update};
use crate::adapters;
use crate::cli::{Launch, Outcome};
use crate::config::{Config, ConfigError, ModelConfig, Origin, PpoConfig, Role, Stage};
use crate::dataset;
use crate::dry_run;
use crate::error::{Result, StageError};
use crate::footprint::SLOTS;
use crate::models::{self, LoadedModel};
use crate::monitor::{MetricsRow, field};
use crate::plan::PpoModels;
use crate::ranks::Team;
use crate::run::{Run, is_due};
use crate::scoring::{Scorer, scorer};

/// Skipped updates in a row that end the run.
const MAX_SKIPPED: u32 = 3;

/// Runs PPO in `dir`; `pipeline` is the pipeline's directory, if it is run as part of one.
///
/// # Errors
/// What can end a stage, with the file, key or row concerned.
pub fn run(launch: &Launch, dir: &Path, pipeline: Option<&Path>) -> Result<Outcome> {
    let config = &launch.config;
    let ppo = &config.ppo;
    let sources = config.ppo_models(pipeline)?;
    if launch.dry_run {
        return plan(launch, &sources);
    }
    let mut run = Run::open(dir, Stage::Ppo, config, launch.resume, &launch.world)?;
    if run.is_finished() {
        return Ok(Outcome::Finished);
    }
    let base = models::load_for(config, &sources.actor, Head::Language)?;
    base.check_length("ppo.max_prompt_tokens + ppo.max_response_tokens", ppo.longest_sequence())?;
    let critic = models::load_for(config, &sources.critic, Head::Scalar)?;
    check_critic(&base, &critic)?;
    run.pin("actor", &base.digest()?)?;
    run.pin("critic", &critic.digest()?)?;
    let team = Team::new(launch, &run, Stage::Ppo)?;
    let mut scorer = scorer(&team, &sources.reward, &base.tokenizer, ppo.tokens_per_micro_batch)?;
    let prompts = dataset::prompts(config, &base.tokenizer)?;
    run.pin("data", &prompts.digest)?;

    let (mut learner, mut state) = start(&run, config, &team, &base.blueprint, critic)?;
    // Adapters leave the weights beneath them as they are: the reference needs no copy of its own.
    let reference = match learner.actor.model().lora() {
        Some(_) => learner.actor.model().base(),
        None => base.blueprint.place(&team.placement(Role::Reference)?)?,
    };
    let explorer = Explorer {
        team: &team,
        prompts: &prompts.train,
        reference: &reference,
        tokenizer: &base.tokenizer,
        rollout: rollout_config(ppo, base.tokenizer.stop_ids()),
        prompts_per_iteration: ppo.prompts_per_iteration,
        samples_per_prompt: ppo.samples_per_prompt,
        tokens_per_micro_batch: ppo.tokens_per_micro_batch,
        rollout_weights: ppo.rollout_weights,
        seed: config.run.seed,
    };
    let mut progress = launch.progress("ppo", ppo.iterations, state.iteration);
    while state.iteration < ppo.iterations {
        let started = Instant::now();
        let (back, Rollout { rows, gap }, times) = gather(&run, &explorer, learner, &mut *scorer, &state)?;
        learner = back;
        let place = checkpoint_number(ppo, &state);
        if launch.should_stop(Tag::new("ppo/stop before updates", place))? && state.update == 0 {
            return stop(&mut run, ppo, &learner, &state);
        }
        let figures = experience::figures(&rows);
        let shape = RewardShape {
            kl_coefficient: state.kl_coefficient,
            score_clip: ppo.reward.clip,
            missing_eos_penalty: ppo.missing_eos_penalty,
        };
        let tokens: usize = rows.iter().map(|row| row.prompt_ids.len() + row.response_ids.len()).sum();
        let count = rows.len();
        let lessons = experience::lessons(rows, &shape, ppo.gamma, ppo.lambda);
        while state.update < updates_per_iteration(ppo) {
            let learners = match state.iteration < ppo.critic_warmup_iterations {
                true => Learners::Critic,
                false => Learners::Both,
            };
            let members = mini_batch(config, &state, &lessons);
            let outcome =
                update(&team, &mut learner.actor, &mut learner.critic, &members, learners, &update_config(ppo))?;
            follow(&mut learner, &mut state, &outcome)?;
            let per_token = outcome.policy.approx_kl / outcome.policy.tokens;
            if ppo.max_approx_kl.is_some_and(|most| per_token > most) {
                state.update = updates_per_iteration(ppo);
            }
            let stop_tag = Tag::new("ppo/stop", checkpoint_number(ppo, &state));
            if state.update < updates_per_iteration(ppo) && launch.should_stop(stop_tag)? {
                return stop(&mut run, ppo, &learner, &state);
            }
        }
        let elapsed_s = started.elapsed().as_secs_f64();
        let train_s = (elapsed_s - times.generate_s - times.score_s).max(0.0);
        run.log(&metrics(&state, &figures, gap, &times, train_s, tokens, elapsed_s))?;
        let mut kl = KlController::new(&ppo.kl).at(state.kl_coefficient);
        kl.observe(figures.kl_mean, count);
        state = PpoState {
            iteration: state.iteration + 1,
            update: 0,
            kl_coefficient: kl.coefficient(),
            totals: Totals::default(),
            ..state
        };
        progress.update(
            state.iteration,
            &format!("reward {:+.3}  kl {:.2}  len {:.1}", figures.score_mean, figures.kl_mean, figures.len_mean),
        );
        if launch.should_stop(Tag::new("ppo/stop after updates", checkpoint_number(ppo, &state)))? {
            return stop(&mut run, ppo, &learner, &state);
        }
        if is_due(state.iteration, ppo.checkpoint_every) || state.iteration == ppo.iterations {
            run.save(checkpoint_number(ppo, &state), &state, |staging| learner.save(staging))?;
        }
    }
    progress.finish();

    learner.actor.join_ranks()?;
    let trained = &learner.trained()?;
    adapters::publish(trained, &config.lora, &sources.actor, &mut run)?;
    let comparison = report::compare(&team, &reference, trained, &prompts.eval, &mut *scorer, &base.tokenizer, config)?;
    if pipeline.is_none() {
        // A pipeline prints it with the results of the other stages.
        launch.say(&comparison);
    }
    run.finish(&comparison.results(), |staging| {
        models::export(trained, &base.tokenizer, &base.source_config, None, config, staging)
    })?;
    Ok(Outcome::Finished)
}

/// The models and counters to go on from: those of the newest checkpoint, or fresh ones.
fn start(
    run: &Run,
    config: &Config,
    team: &Team,
    actor: &Blueprint,
    critic: LoadedModel,
) -> Result<(Learner, PpoState)> {
    let ppo = &config.ppo;
    let steps = ppo.steps();
    let (actor_optimizer, critic_optimizer) =
        (config.lora.optimizer(&ppo.actor_optimizer).build(steps), ppo.critic_optimizer.build(steps));
    let (actor_place, critic_place) = (team.placement(Role::Actor)?, team.placement(Role::Critic)?);
    let switching = SwitchConfig {
        release_inference_cache: ppo.release_inference_cache,
        pin_parameters: ppo.pin_parameters,
        gather_units: ppo.tp_gather_partition_size,
        weights: ppo.rollout_weights,
    };
    if let Some(point) = run.resume_point() {
        let critic = (critic.blueprint.spec(), critic_optimizer, &critic_place);
        let mut learner =
            Learner::load(&point.files, (actor, &config.lora, actor_optimizer, &actor_place), critic, ppo.ema_decay)?;
        learner.actor = learner.actor.switching(switching);
        return Ok((learner, point.state()?));
    }
    let critic = critic.in_units_of_reward().place(&critic_place)?;
    let critic = Engine::placed(critic, critic_optimizer, critic_place)?;
    let actor = adapters::attach(actor.place(&actor_place)?, &config.lora, config.run.seed, &actor_place)?;
    let ema = ppo.ema_decay.map(|decay| Ema::new(&actor, decay, &actor_place)).transpose()?;
    let actor = Engine::placed(actor, actor_optimizer, actor_place)?.switching(switching);
    let learner = Learner { actor, critic, ema };
    let state = PpoState {
        iteration: 0,
        update: 0,
        kl_coefficient: ppo.kl.coefficient,
        skipped_in_a_row: 0,
        totals: Totals::default(),
    };
    Ok((learner, state))
}

/// The critic reads the actor's tokens as they are, so both must mean the same by them.
fn check_critic(actor: &LoadedModel, critic: &LoadedModel) -> Result<()> {
    if actor.tokenizer.files().tokenizer() == critic.tokenizer.files().tokenizer() {
        return Ok(());
    }
    let problem = "`ppo.critic` has another tokenizer than the actor; start it from a model with the actor's tokenizer";
    Err(ConfigError::Invalid { origin: Origin::Defaults, problems: vec![problem.into()] }.into())
}

/// Prints what would be done and held in memory.
fn plan(launch: &Launch, sources: &PpoModels) -> Result<Outcome> {
    let ppo = &launch.config.ppo;
    if let Some(outcome) = dry_run::from_shape(launch, Stage::Ppo)? {
        return Ok(outcome);
    }
    let config = &launch.config;
    let shape = |source: &str| -> Result<ModelSpec> {
        Ok(models::load_for(config, source, Head::Language)?.blueprint.spec().clone())
    };
    // In a pipeline that has not begun there is no actor to look at yet; its shape is that of `[model]`.
    let spec = shape(&sources.actor).or_else(|error| match (&config.model, &config.tokenizer.train) {
        (ModelConfig { path: Some(path), .. }, _) => shape(path),
        (ModelConfig { new: Some(new), .. }, Some(train)) => Ok(new.spec(train.vocab_size)),
        _ => Err(error),
    })?;
    let samples = ppo.samples_per_iteration();
    dry_run::print(launch, Stage::Ppo, &spec, &format!("{} iterations of {samples} samples", ppo.iterations))
}

/// The experience of the iteration under way: what was committed, or else sampled and committed now.
fn gather(
    run: &Run,
    explorer: &Explorer<'_>,
    learner: Learner,
    scorer: &mut dyn Scorer,
    state: &PpoState,
) -> Result<(Learner, Rollout, Times)> {
    let fresh = state.update == 0;
    let policy_step = fresh.then(|| learner.actor.optimizer().step());
    if let Some(rollout) = experience::read(run, state.iteration, policy_step)? {
        return Ok((learner, rollout, Times::default()));
    }
    if !fresh {
        return Err(StageError::Numerical(format!(
            "{} is missing or damaged, and the policy that sampled it has moved on; remove the newest checkpoint",
            run.experience_path(state.iteration).display()
        )));
    }
    let Learner { actor, critic, ema } = learner;
    let (actor, fresh, times) = explorer.explore(actor, critic.model(), scorer, state.iteration)?;
    experience::commit(run, state.iteration, &fresh, rollout::groups(explorer.team.parallel()))?;
    let rollout = experience::read(run, state.iteration, policy_step)?.unwrap_or(fresh);
    Ok((Learner { actor, critic, ema }, rollout, times))
}

/// The mini-batch of the update at hand: each epoch visits every sample once, in an order of its own.
fn mini_batch<'a>(config: &Config, state: &PpoState, lessons: &'a [Lesson]) -> Vec<&'a Lesson> {
    let ppo = &config.ppo;
    let mini_batches = ppo.mini_batches as u64;
    let (epoch, part) = (state.update / mini_batches, (state.update % mini_batches) as usize);
    let order = permutation(config.run.seed, state.iteration * ppo.epochs as u64 + epoch, lessons.len());
    let bound = |part: usize| part * lessons.len() / ppo.mini_batches;
    order[bound(part)..bound(part + 1)].iter().map(|&index| &lessons[index]).collect()
}

/// Notes the outcome of an update: counters, average, and whether it is time to give up.
fn follow(learner: &mut Learner, state: &mut PpoState, outcome: &update::UpdateOutcome) -> Result<()> {
    state.totals.add(state.update, outcome);
    state.update += 1;
    if let Some(ema) = &mut learner.ema
        && outcome.actor_is_finite
    {
        ema.update(learner.actor.model())?;
    }
    if outcome.actor_is_finite && outcome.critic_is_finite {
        state.skipped_in_a_row = 0;
        return Ok(());
    }
    state.skipped_in_a_row += 1;
    if state.skipped_in_a_row >= MAX_SKIPPED {
        return Err(StageError::Numerical(format!(
            "iteration {}: {MAX_SKIPPED} updates in a row had gradients that are not finite",
            state.iteration + 1
        )));
    }
    Ok(())
}

fn stop(run: &mut Run, ppo: &PpoConfig, learner: &Learner, state: &PpoState) -> Result<Outcome> {
    run.save_now(checkpoint_number(ppo, state), state, |staging| learner.save(staging))?;
    Ok(Outcome::Stopped)
}

fn updates_per_iteration(ppo: &PpoConfig) -> u64 {
    (ppo.epochs * ppo.mini_batches) as u64
}

/// Checkpoints are numbered by updates, so that one may be taken in the middle of an iteration.
fn checkpoint_number(ppo: &PpoConfig, state: &PpoState) -> u64 {
    state.iteration * updates_per_iteration(ppo) + state.update
}

fn update_config(ppo: &PpoConfig) -> UpdateConfig {
    UpdateConfig {
        policy_clip: ppo.policy_clip,
        value_clip: ppo.value_clip,
        entropy_coefficient: ppo.entropy_coefficient,
        whiten: ppo.whiten,
        tokens_per_micro_batch: ppo.tokens_per_micro_batch,
        recompute: if ppo.recompute { Recompute::On } else { Recompute::Off },
    }
}

fn rollout_config(ppo: &PpoConfig, stop: &[u32]) -> RolloutConfig {
    RolloutConfig {
        sampling: ppo.sampling.params(),
        max_response_tokens: ppo.max_response_tokens,
        stop: stop.to_vec(),
        slots: SLOTS,
        prefill_tokens: ppo.tokens_per_micro_batch,
    }
}

fn metrics(
    state: &PpoState,
    figures: &Figures,
    gap: Option<Gap>,
    times: &Times,
    train_s: f64,
    tokens: usize,
    elapsed_s: f64,
) -> MetricsRow {
    let totals = &state.totals;
    let per_token = |sum: f64| sum / totals.tokens.max(1.0);
    let mut row = MetricsRow::new(state.iteration + 1);
    row.set(field::LOSS, per_token(totals.loss))
        .set(field::LR, totals.lr)
        .set(field::GRAD_NORM, totals.grad_norm / totals.updates.max(1) as f64)
        .set(field::TOKENS, tokens as u64)
        .set(field::TOKENS_PER_S, tokens as f64 / elapsed_s.max(1e-9))
        .set(field::REWARD_MEAN, figures.score_mean)
        .set(field::REWARD_STD, figures.score_std)
        .set(field::KL_MEAN, figures.kl_mean)
        .set(field::KL_COEFFICIENT, state.kl_coefficient)
        .set(field::ENTROPY, per_token(totals.entropy))
        .set(field::CLIP_FRACTION, per_token(totals.clipped))
        .set(field::RATIO_MAX, totals.ratio_max)
        .set(field::APPROX_KL, per_token(totals.approx_kl))
        .set(field::VALUE_LOSS, per_token(totals.value_loss))
        .set(field::RESPONSE_LEN_MEAN, figures.len_mean)
        .set(field::RESPONSE_EOS_RATE, figures.eos_rate)
        .set(field::LOGP_GAP_MAX, gap.map_or(totals.logp_gap_max, |gap| gap.max.max(totals.logp_gap_max)))
        .set_some(field::LOGP_GAP_MEAN, gap.map(|gap| gap.mean))
        .set(field::TIME_GENERATE_S, times.generate_s)
        .set(field::TIME_SCORE_S, times.score_s)
        .set(field::TIME_TRAIN_S, train_s);
    row
}
