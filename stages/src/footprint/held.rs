//! Memory of a rank. Sharding after Rajbhandari et al. (ZeRO, 2020), figure 1, with four bytes for what is trained, and for
//! the rest those of the format that models compute in.

use tandem_engine::WeightFormat;
use tandem_engine::generate::CacheSize;
use tandem_engine::model::spec::ModelSpec;
use tandem_engine::model::unit::Head;
use tandem_engine::parallel::LARGE_PASS;
use tandem_engine::train::MOMENTS_AT_ONCE;

use super::share::{Units, int8_bytes};
use super::{Case, F32, Held, Phase, SLOTS};
use crate::config::{Offload, OptimizerConfig, OptimizerKind, Role, Stage};

impl Case<'_> {
    pub(super) fn held(&self) -> Vec<Held> {
        let mut parts: Vec<Held> = self.roles().flat_map(|(role, head)| self.model(role, head)).collect();
        if self.stage == Stage::Ppo {
            parts.extend(self.generation());
        }
        parts
    }

    /// One model and all that training it takes.
    fn model(&self, role: Role, head: Head) -> Vec<Held> {
        let name = role.section().replace('_', " ");
        let settings = self.config.role(role);
        let mesh = self.mesh;
        let units = Units::of(self.spec, head, mesh.tensor, mesh.pipeline);
        let is_trained = role.is_trained(self.stage);
        let zero_stage = if is_trained || settings.zero_stage == 3 { settings.zero_stage } else { 0 };
        let part = |what: String, elements: u64, is_in_files: bool| {
            let bytes = F32 * elements;
            let (bytes, file_bytes) = if is_in_files { (0, bytes) } else { (bytes, 0) };
            Held { what, bytes, file_bytes, phase: None }
        };
        let at_work = |what: String, elements: u64| Held {
            what,
            bytes: F32 * elements,
            file_bytes: 0,
            phase: Some(Phase::Computing(role)),
        };
        let kept = |units: Units, from_stage: u8| match zero_stage >= from_stage {
            true => units.slice(mesh.data),
            false => units.total(),
        };
        let (large, small) = units.persistent(self.config.parallel.persistence_threshold);
        let weights = if zero_stage == 3 { large.slice(mesh.data) + small.total() } else { units.total() };
        let is_sliced = zero_stage == 3 && mesh.data > 1;
        let weights_in_files = settings.offload == Offload::All && (is_sliced || !is_trained);
        let (number, is_narrow) = (self.number(), self.number() != F32);
        let always = |what: String, bytes: u64| Held { what, bytes, file_bytes: 0, phase: None };
        let mut parts = Vec::new();
        if !is_trained && settings.weights == WeightFormat::Int8 {
            let bytes = int8_bytes(self.spec, head, mesh.tensor, mesh.pipeline);
            parts.push(always(format!("{name}: weights, 8 bits"), bytes));
        } else if is_narrow && !is_trained && !is_sliced {
            let (bytes, file_bytes) = if weights_in_files { (0, number * weights) } else { (number * weights, 0) };
            parts.push(Held { bytes, file_bytes, ..always(format!("{name}: weights"), 0) });
        } else {
            parts.push(part(format!("{name}: weights"), weights, weights_in_files));
        }
        if weights_in_files && !is_sliced && settings.weights != WeightFormat::Int8 {
            parts.push(Held {
                bytes: number * units.largest(),
                ..at_work(format!("{name}: a unit out of its file"), 0)
            });
        }
        if is_narrow && is_trained && !is_sliced {
            let is_kept = self.micro_batch_tokens() < LARGE_PASS;
            let phase = (!is_kept).then_some(Phase::Computing(role));
            parts.push(Held { phase, ..always(format!("{name}: weights to compute with"), self.copies(&units)) });
        }
        if is_sliced {
            let ahead = self.config.parallel.prefetch_units as u64;
            let what = format!("{name}: units gathered at once, {}", 1 + ahead);
            parts.push(Held { bytes: (1 + ahead) * number * large.largest(), ..at_work(what, 0) });
        }
        if !is_trained {
            return parts;
        }
        let mut trained = units;
        if self.has_adapters(role) {
            trained = Units::of_adapters(self.spec, &self.config.lora, mesh);
            parts.push(part(format!("{name}: adapters"), kept(trained, 3), weights_in_files));
        }
        let gradients = (format!("{name}: gradients"), kept(trained, 2));
        // One rank with one lane adds up where kernels write, in memory that it takes for the step alone.
        let is_in_place = mesh.data.max(self.config.parallel.data_lanes) == 1;
        parts.push(if is_in_place { at_work(gradients.0, gradients.1) } else { part(gradients.0, gradients.1, false) });
        if zero_stage >= 2 && mesh.data > 1 {
            parts.push(at_work(format!("{name}: gradients under way, 2 units"), 2 * trained.largest()));
        }
        let optimizer = self.optimizer(role);
        // Signs need no second moment.
        let moments = if optimizer.kind == OptimizerKind::SignSgd { 1 } else { 2 };
        let in_files = settings.offload != Offload::None;
        parts.push(part(format!("{name}: optimizer moments"), moments * kept(trained, 1), in_files));
        if in_files {
            let ranks = if zero_stage >= 1 { mesh.data as u64 } else { 1 };
            let most = if optimizer.kind == OptimizerKind::Adamw { MOMENTS_AT_ONCE as u64 } else { u64::MAX };
            let at_once = moments * trained.largest().div_ceil(ranks).min(most);
            parts.push(at_work(format!("{name}: moments that are updated at once"), at_once));
        }
        if matches!(optimizer.kind, OptimizerKind::OneBitAdam | OptimizerKind::ZeroOneAdam) && mesh.data > 1 {
            // What a rank's own signs leave out, and what those of its slice of the sum do.
            let errors = trained.total() + trained.slice(mesh.data);
            parts.push(part(format!("{name}: errors fed back"), errors, false));
        }
        if role == Role::Actor && self.stage == Stage::Ppo && self.config.ppo.ema_decay.is_some() {
            parts.push(part(format!("{name}: average"), kept(trained, 3), false));
        }
        let tokens = self.micro_batch_tokens();
        let activations = self.activations(tokens);
        parts.push(Held { bytes: activations, ..at_work(format!("{name}: activations of {tokens} tokens"), 0) });
        parts
    }

    /// Bytes of what passes in bf16 compute with beside the weights that are trained: of large ones a unit. Small ones keep all
    /// units, but fewer activations.
    fn copies(&self, units: &Units) -> u64 {
        let (all, tokens) = (self.number() * units.total(), self.micro_batch_tokens());
        if tokens < LARGE_PASS {
            return all;
        }
        let spared = self.activations(tokens) - self.activations(LARGE_PASS - 1);
        (self.number() * units.largest()).max(all.saturating_sub(spared))
    }

    /// The optimizer that moves `role`.
    pub(super) fn optimizer(&self, role: Role) -> &OptimizerConfig {
        match (self.stage, role) {
            (Stage::Sft, _) => &self.config.sft.optimizer,
            (Stage::Reward, _) => &self.config.reward.optimizer,
            (Stage::Ppo, Role::Critic) => &self.config.ppo.critic_optimizer,
            (Stage::Ppo, _) => &self.config.ppo.actor_optimizer,
        }
    }

    /// The actor's copy that generates, where the training weights cannot, and its key-value cache.
    fn generation(&self) -> Vec<Held> {
        let ppo = &self.config.ppo;
        let tensor = ppo.inference_tp_size.max(1);
        let generating = |is_kept: bool| (!is_kept).then_some(Phase::Generating);
        let mut parts = Vec::new();
        let units = Units::of(self.spec, Head::Language, tensor, 1);
        let is_int8 = ppo.rollout_weights == WeightFormat::Int8;
        if is_int8 {
            let what = "actor: copy that generates, 8 bits".to_owned();
            let bytes = int8_bytes(self.spec, Head::Language, tensor, 1);
            parts.push(Held { what, bytes, file_bytes: 0, phase: Some(Phase::Generating) });
        } else if self.needs_copy() {
            let what = "actor: copy that generates".to_owned();
            let phase = generating(ppo.pin_parameters);
            parts.push(Held { what, bytes: self.number() * units.total(), file_bytes: 0, phase });
        }
        let what = "actor: matrices packed for decoding".to_owned();
        // What is kept in 8 bits is packed, and in bf16 those of a copy's blocks are there instead of the plain ones: the head
        // remains.
        let is_instead = is_int8 || self.needs_copy() && self.number() != F32;
        // Of the ends in bf16 the plain ones are there too, for the embedding.
        let looked_up = if self.number() == F32 { 0 } else { units.ends };
        let packed = if is_instead { units.ends } else { units.total() + looked_up };
        parts.push(Held { what, bytes: self.number() * packed, file_bytes: 0, phase: Some(Phase::Generating) });
        let replicas = (self.mesh.world() / tensor).max(1);
        let slots = SLOTS.min(ppo.samples_per_iteration().div_ceil(replicas));
        let size = CacheSize { slots, max_len: ppo.longest_sequence() };
        // Heads stay whole: with more ranks than heads some hold the same one.
        let cut = ModelSpec { kv_heads: self.spec.kv_heads.div_ceil(tensor), ..self.spec.clone() };
        let what = format!("cache of {slots} sequences of {} tokens", size.max_len);
        let phase = generating(!ppo.release_inference_cache);
        parts.push(Held { what, bytes: size.bytes(&cut, self.config.run.precision) as u64, file_bytes: 0, phase });
        parts
    }

    /// Bytes of a number that passes compute with.
    pub(super) fn number(&self) -> u64 {
        self.config.run.precision.bytes() as u64
    }

    /// Whether the weights that are trained are laid out otherwise than those that generate.
    pub(super) fn needs_copy(&self) -> bool {
        let sharded = self.config.actor.zero_stage == 3 && self.mesh.data > 1;
        let same_cut = self.mesh.tensor == self.config.ppo.inference_tp_size && self.mesh.pipeline == 1;
        sharded || !same_cut || self.config.lora.is_on()
    }

    /// Bytes of what a forward keeps for its backward: per block the inputs of its norms and what linear maps and attention
    /// make; with recomputation only the block's input. All of one block at a time: also what norms and activations make. The
    /// first stage of a pipeline keeps as many micro-batches as there are stages.
    fn activations(&self, tokens: usize) -> u64 {
        let spec = self.spec;
        let (tensor, number) = (self.mesh.tensor.max(1), self.number() as usize);
        // The residual stream goes into two norms in f32; what branches compute is in the format of the weights.
        let residual = 2 * F32 as usize * spec.hidden;
        let cut = spec.qkv_width() + spec.heads * spec.head_dim + spec.heads + spec.up_width();
        let inputs = 2 * number * spec.hidden;
        let block = residual + inputs + number * (cut + spec.mlp_width).div_ceil(tensor);
        // Without a norm before it, a branch reads the residual stream, rounded.
        let lean = residual + if spec.post_norm { inputs } else { 0 } + number * cut.div_ceil(tensor);
        let layers = spec.layers.div_ceil(self.mesh.pipeline.max(1));
        let kept = if self.recompute() { F32 as usize * layers * spec.hidden } else { layers * lean };
        let under_way = (self.mesh.pipeline as u64).min(self.micro_batches(self.rows_per_step()));
        // The backward of a block holds about as much again as its forward has kept of it.
        let working = if self.recompute() { 2 * block } else { block };
        tokens as u64 * (under_way.max(1) * kept as u64 + working as u64)
    }
}
