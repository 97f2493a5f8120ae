//! What a PPO run must remember to continue bit for bit, beside the weights.

use serde::{Deserialize, Serialize};
use tandem_engine::checkpoint::{load_ema, load_engine, load_lora_engine, save_ema, save_engine};
use tandem_engine::model::Blueprint;
use tandem_engine::model::spec::ModelSpec;
use tandem_engine::model::unit::Head;
use tandem_engine::parallel::Placement;
use tandem_engine::train::{Ema, OptimizerConfig};
use tandem_engine::{Engine, Model, Train};
use tandem_store::{Published, Staging};

use super::loss::PolicyStats;
use super::update::UpdateOutcome;
use crate::adapters;
use crate::config::LoraConfig;
use crate::error::Result;

const ACTOR: &str = "actor";
const CRITIC: &str = "critic";
const EMA: &str = "ema";

/// The models that PPO trains.
pub(super) struct Learner {
    pub(super) actor: Engine<Train>,
    pub(super) critic: Engine<Train>,
    pub(super) ema: Option<Ema>,
}

/// Counters of a run. Everything random is addressed by them and needs no state of its own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct PpoState {
    /// Iterations completed.
    pub(super) iteration: u64,
    /// Updates made in the iteration under way; its experience is committed once this is above 0.
    pub(super) update: u64,
    /// The KL coefficient.
    #[serde(with = "bits")]
    pub(super) kl_coefficient: f64,
    /// Updates in a row in which a model stayed as it was, because its gradient was not finite.
    pub(super) skipped_in_a_row: u32,
    /// What the iteration's updates did so far.
    pub(super) totals: Totals,
}

/// Sums over the updates of one iteration.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Totals {
    /// Updates made; fewer than planned where the iteration was cut short.
    pub(super) updates: u64,
    #[serde(with = "bits")]
    pub(super) tokens: f64,
    #[serde(with = "bits")]
    pub(super) loss: f64,
    #[serde(with = "bits")]
    pub(super) entropy: f64,
    #[serde(with = "bits")]
    pub(super) clipped: f64,
    #[serde(with = "bits")]
    pub(super) approx_kl: f64,
    #[serde(with = "bits")]
    pub(super) ratio_max: f64,
    /// Of the first update only: there, new and recorded log-probabilities must agree.
    #[serde(with = "bits")]
    pub(super) logp_gap_max: f64,
    #[serde(with = "bits")]
    pub(super) value_loss: f64,
    #[serde(with = "bits")]
    pub(super) grad_norm: f64,
    #[serde(with = "bits")]
    pub(super) lr: f64,
}

impl Totals {
    /// Takes in the outcome of update number `update` of the iteration.
    pub(super) fn add(&mut self, update: u64, outcome: &UpdateOutcome) {
        let PolicyStats { tokens, loss, entropy, clipped, approx_kl, ratio_max, logp_gap_max } = outcome.policy;
        self.updates += 1;
        self.tokens += tokens;
        self.loss += loss;
        self.entropy += entropy;
        self.clipped += clipped;
        self.approx_kl += approx_kl;
        self.ratio_max = self.ratio_max.max(ratio_max);
        if update == 0 {
            self.logp_gap_max = logp_gap_max;
        }
        self.value_loss += outcome.value_loss;
        self.grad_norm += outcome.grad_norm;
        self.lr = outcome.lr;
    }
}

/// f64 by its bits: a decimal round trip may lose the last one.
pub(super) mod bits {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(in crate::ppo) fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(value.to_bits())
    }

    pub(in crate::ppo) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        Ok(f64::from_bits(u64::deserialize(deserializer)?))
    }
}

impl Learner {
    /// The model that comes out of the run: the average where one is kept, else the actor.
    pub(super) fn trained(&self) -> Result<Model> {
        let actor = self.actor.model();
        Ok(match &self.ema {
            Some(ema) => ema.model(actor)?,
            None => actor.clone(),
        })
    }

    /// Brings weights and optimizer state together, and writes them where there is somewhere to write to.
    pub(super) fn save(&self, mut staging: Option<&mut Staging>) -> Result<()> {
        let actor = save_engine(&self.actor, ACTOR, staging.as_deref_mut());
        let critic = save_engine(&self.critic, CRITIC, staging.as_deref_mut());
        // Ranks bring all parts together, whatever the disk has said of the first ones.
        let average = match &self.ema {
            Some(ema) => save_ema(ema, self.actor.model(), EMA, staging),
            None => Ok(()),
        };
        Ok(actor.and(critic).and(average)?)
    }

    /// Reads what [`Learner::save`] wrote.
    pub(super) fn load(
        checkpoint: &Published,
        actor: (&Blueprint, &LoraConfig, OptimizerConfig, &Placement),
        critic: (&ModelSpec, OptimizerConfig, &Placement),
        ema_decay: Option<f64>,
    ) -> Result<Self> {
        let (base, lora, optimizer, placement) = actor;
        let actor = match adapters::config(lora, base.spec(), Head::Language)? {
            Some(lora) => load_lora_engine(base.place(placement)?, &lora, optimizer, ACTOR, checkpoint, placement)?,
            None => load_engine(base.spec(), Head::Language, optimizer, ACTOR, checkpoint, placement)?,
        };
        let load_ema = |decay| load_ema(actor.model(), decay, EMA, checkpoint, placement);
        let ema = ema_decay.map(load_ema).transpose()?;
        let (spec, optimizer, placement) = critic;
        Ok(Self { actor, critic: load_engine(spec, Head::Scalar, optimizer, CRITIC, checkpoint, placement)?, ema })
    }
}
