//! What a rank sends. Gathering a buffer of `n` elements that `N` ranks hold in slices, or reducing it to slices, costs each
//! of them `(N − 1)/N · n`; an all-reduce is both.

use tandem_engine::model::unit::Head;

use super::share::Units;
use super::{Case, F32, Sent};
use crate::config::{OptimizerKind, Role, Stage};

impl Case<'_> {
    pub(super) fn sent(&self) -> Vec<Sent> {
        let updates = match self.stage {
            Stage::Sft | Stage::Reward => 1,
            Stage::Ppo => (self.config.ppo.epochs * self.config.ppo.mini_batches) as u64,
        };
        let rounds = self.micro_batches(self.rows_per_step());
        let mut parts = Vec::new();
        for (role, head) in self.roles() {
            let name = role.section().replace('_', " ");
            if role.is_trained(self.stage) {
                parts.push((format!("{name}: weights and gradients"), updates * self.sharding(role, head, rounds)));
                // Twice forward and twice backward; with recomputation forward once more.
                let passes = if self.recompute() { 3 } else { 2 };
                let tokens = rounds * self.micro_batch_tokens() as u64;
                let sums = self.tensor_sums(self.mesh.tensor, self.blocks(), passes, tokens);
                parts.push((format!("{name}: sums inside blocks"), updates * sums));
                parts.push((format!("{name}: between pipeline stages"), updates * self.pipeline(tokens)));
            }
            if self.stage == Stage::Ppo && role != Role::Actor {
                parts.push((format!("{name}: measuring responses"), self.measuring(role, head)));
            }
        }
        if self.stage == Stage::Ppo {
            parts.push(("actor: switch to generation".to_owned(), self.switch()));
            parts.push(("actor: sums while generating".to_owned(), self.generating()));
        }
        parts.retain(|(_, bytes)| *bytes > 0);
        parts.into_iter().map(|(what, bytes)| Sent { what, bytes }).collect()
    }

    /// One optimizer step of `role` in `rounds` micro-batches, between data-parallel ranks.
    fn sharding(&self, role: Role, head: Head, rounds: u64) -> u64 {
        let ranks = self.mesh.data;
        let base = Units::of(self.spec, head, self.mesh.tensor, self.mesh.pipeline);
        let trained = match self.has_adapters(role) {
            true => Units::of_adapters(self.spec, &self.config.lora, self.mesh),
            false => base,
        };
        if self.optimizer(role).kind != OptimizerKind::Adamw {
            // One bit per number, to the owner of a slice and back from it.
            return 2 * exchange(trained, ranks).div_ceil(32);
        }
        let zero_stage = self.config.role(role).zero_stage;
        let gradients = exchange(trained, ranks);
        match zero_stage {
            // Reduced and gathered: as gradients, or once they have become weights.
            0 | 1 => 2 * gradients,
            2 => (rounds + 1) * gradients,
            _ => {
                let (large, small) = base.persistent(self.config.parallel.persistence_threshold);
                let kept = if self.has_adapters(role) { 0 } else { exchange(small, ranks) };
                // Gathered for the forward and again for the backward.
                rounds * (2 * self.gathering(large, ranks) + gradients) + kept
            }
        }
    }

    /// Bytes of the all-reduces of `tokens` tokens in `blocks` blocks: two of them in each of `passes` passes, and one each
    /// for the embedding and the head.
    fn tensor_sums(&self, tensor: usize, blocks: u64, passes: u64, tokens: u64) -> u64 {
        let tensor = tensor.max(1) as u64;
        let sums = 2 * blocks * passes + 2;
        F32 * sums * tokens * self.spec.hidden as u64 * 2 * (tensor - 1) / tensor
    }

    /// Hidden states of `tokens` tokens to the next stage, and their gradients to the one before.
    fn pipeline(&self, tokens: u64) -> u64 {
        // Of two stages one sends forward and the other backward; a stage in the middle does both.
        let directions = self.mesh.pipeline.saturating_sub(1).min(2) as u64;
        directions * F32 * tokens * self.spec.hidden as u64
    }

    /// One forward of `role` over all responses of an iteration.
    fn measuring(&self, role: Role, head: Head) -> u64 {
        let rounds = self.micro_batches(self.config.ppo.samples_per_iteration());
        let tokens = rounds * self.micro_batch_tokens() as u64;
        let mesh = self.mesh;
        let weights = match self.config.role(role).zero_stage {
            3 => {
                let units = Units::of(self.spec, head, mesh.tensor, mesh.pipeline);
                rounds * self.gathering(units.persistent(self.config.parallel.persistence_threshold).0, mesh.data)
            }
            _ => 0,
        };
        let forward = if mesh.pipeline > 1 { F32 * tokens * self.spec.hidden as u64 } else { 0 };
        weights + self.tensor_sums(mesh.tensor, self.blocks(), 1, tokens) + forward
    }

    /// Re-laying the actor out: what a rank needs for generation and does not hold, less exactly where its slice happens to
    /// lie in that part. On average every rank sends as much as it receives.
    fn switch(&self) -> u64 {
        let (mesh, tensor) = (self.mesh, self.config.ppo.inference_tp_size.max(1));
        let needed = Units::of(self.spec, Head::Language, tensor, 1).total();
        let is_sharded = self.config.actor.zero_stage == 3;
        let slices = if is_sharded { mesh.data } else { 1 };
        // Whole weights, or just the part: nothing is missing.
        if slices == 1 && mesh.pipeline == 1 && (mesh.tensor == 1 || mesh.tensor == tensor) {
            return 0;
        }
        let holders = if mesh.tensor == tensor { slices * mesh.pipeline } else { slices * mesh.pipeline * mesh.tensor };
        F32 * needed * (holders as u64 - 1) / holders as u64
    }

    /// The sums inside the blocks for every token that is read or written in a rollout.
    fn generating(&self) -> u64 {
        let ppo = &self.config.ppo;
        let tensor = ppo.inference_tp_size.max(1);
        let replicas = (self.mesh.world() / tensor).max(1);
        let tokens = ppo.samples_per_iteration().div_ceil(replicas) * ppo.longest_sequence();
        self.tensor_sums(tensor, self.spec.layers as u64, 1, tokens as u64)
    }

    /// Bytes that each of `ranks` sends so that all have all weights of `units` to compute with.
    fn gathering(&self, units: Units, ranks: usize) -> u64 {
        exchange(units, ranks) / F32 * self.number()
    }

    /// Blocks of the pipeline stage with most.
    fn blocks(&self) -> u64 {
        self.spec.layers.div_ceil(self.mesh.pipeline.max(1)) as u64
    }
}

/// Bytes that each of `ranks` sends so that all have all slices of `units`, or so that each has the sum of its slice.
fn exchange(units: Units, ranks: usize) -> u64 {
    F32 * (ranks.max(1) as u64 - 1) * units.slice(ranks)
}
