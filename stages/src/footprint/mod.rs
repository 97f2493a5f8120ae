//! What each rank of a run will hold in memory and send to others: for `--dry-run`.
//!
//! Figures are those of the rank with most; where batches decide, of the largest there can
//! be.

mod held;
mod sent;
mod share;

use std::fmt;

use tandem_engine::model::spec::ModelSpec;
use tandem_engine::model::unit::Head;
use tandem_engine::parallel::Mesh;

use crate::config::{Config, Role, Stage};
use crate::monitor::Table;

/// Bytes of an f32.
const F32: u64 = 4;
/// Sequences that PPO decodes at once, at most.
pub(crate) const SLOTS: usize = 64;

/// What a rank holds and sends.
#[derive(Debug, Clone)]
pub struct Footprint {
    mesh: Mesh,
    nodes: usize,
    held: Vec<Held>,
    /// What "once" is: an optimizer step, or an iteration of PPO.
    round: &'static str,
    sent: Vec<Sent>,
}

/// One part of what a rank holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// What it is.
    pub what: String,
    /// Bytes in memory.
    pub bytes: u64,
    /// Bytes in files that are mapped into memory.
    pub file_bytes: u64,
    /// When it is there; `None`: always. Only one phase takes place at a time.
    pub phase: Option<Phase>,
}

/// A part of the work that needs memory of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// A model computes.
    Computing(Role),
    /// The actor generates.
    Generating,
}

/// One part of what a rank sends in a step, or in an iteration of PPO.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sent {
    /// What it is.
    pub what: String,
    /// Bytes.
    pub bytes: u64,
}

/// The models of a stage and how they are shared: what the figures follow from.
#[derive(Debug, Clone, Copy)]
struct Case<'a> {
    config: &'a Config,
    stage: Stage,
    spec: &'a ModelSpec,
    mesh: Mesh,
}

impl Footprint {
    /// Of `stage` with models of `spec` upon `mesh`, on `nodes` machines.
    pub fn new(config: &Config, stage: Stage, spec: &ModelSpec, mesh: Mesh, nodes: usize) -> Self {
        let case = Case { config, stage, spec, mesh };
        let round = if stage == Stage::Ppo { "an iteration" } else { "a step" };
        Self { mesh, nodes, held: case.held(), round, sent: case.sent() }
    }

    /// The parts of what a rank holds.
    pub fn held(&self) -> &[Held] {
        &self.held
    }

    /// The parts of what a rank sends in a step, or in an iteration of PPO.
    pub fn sent(&self) -> &[Sent] {
        &self.sent
    }

    /// Bytes of memory of a rank, in the phase that needs most.
    pub fn memory_bytes(&self) -> u64 {
        let bytes = |phase: Option<Phase>| -> u64 {
            self.held.iter().filter(|part| part.phase == phase).map(|part| part.bytes).sum()
        };
        bytes(None)
            + self.held.iter().map(|part| part.phase).map(|phase| phase.map_or(0, |_| bytes(phase))).max().unwrap_or(0)
    }

    /// Bytes of files of a rank.
    pub fn file_bytes(&self) -> u64 {
        self.held.iter().map(|part| part.file_bytes).sum()
    }

    /// Bytes that a rank sends in a step, or in an iteration of PPO.
    pub fn sent_bytes(&self) -> u64 {
        self.sent.iter().map(|part| part.bytes).sum()
    }
}

impl Case<'_> {
    /// The models of the stage that take memory of their own, and what they compute.
    fn roles(&self) -> impl Iterator<Item = (Role, Head)> {
        let scored_by_model = self.config.ppo.reward.is_model();
        let adapters = self.config.lora.is_on();
        Role::of(self.stage).iter().copied().filter_map(move |role| match role {
            Role::Actor => Some((role, Head::Language)),
            Role::Critic => Some((role, Head::Scalar)),
            // The base under the actor's adapters is the reference.
            Role::Reference => (!adapters).then_some((role, Head::Language)),
            Role::RewardModel => (self.stage == Stage::Reward || scored_by_model).then_some((role, Head::Scalar)),
        })
    }

    /// Whether `role` is trained by adapters.
    fn has_adapters(&self, role: Role) -> bool {
        self.config.lora.is_on() && role.is_trained(self.stage) && role != Role::Critic
    }

    /// Most tokens in a forward pass.
    fn micro_batch_tokens(&self) -> usize {
        match self.stage {
            Stage::Sft => self.config.sft.tokens_per_micro_batch,
            Stage::Reward => self.config.reward.tokens_per_micro_batch,
            Stage::Ppo => self.config.ppo.tokens_per_micro_batch,
        }
    }

    /// Whether activations are computed again.
    fn recompute(&self) -> bool {
        match self.stage {
            Stage::Sft => self.config.sft.recompute,
            Stage::Reward => self.config.reward.recompute,
            Stage::Ppo => self.config.ppo.recompute,
        }
    }

    /// Longest row, in tokens: of a step's rows, or of a rollout's.
    fn row_tokens(&self) -> usize {
        match self.stage {
            Stage::Sft => self.config.data.max_tokens,
            Stage::Reward => 2 * self.config.data.max_tokens,
            Stage::Ppo => self.config.ppo.longest_sequence(),
        }
    }

    /// Most forward passes that a rank makes for `rows` rows: each lane is cut into micro-batches of its own.
    fn micro_batches(&self, rows: usize) -> u64 {
        let lanes = self.config.lanes(self.mesh, self.stage).data.max(1);
        let rows_per_pass = (self.micro_batch_tokens() / self.row_tokens().max(1)).max(1);
        (lanes.div_ceil(self.mesh.data.max(1)) * rows.div_ceil(lanes).div_ceil(rows_per_pass)) as u64
    }

    /// Rows of one optimizer step.
    fn rows_per_step(&self) -> usize {
        match self.stage {
            Stage::Sft => self.config.sft.sequences_per_step,
            Stage::Reward => self.config.reward.pairs_per_step,
            Stage::Ppo => self.config.ppo.samples_per_iteration().div_ceil(self.config.ppo.mini_batches.max(1)),
        }
    }
}

impl fmt::Display for Footprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Mesh { data, tensor, pipeline } = self.mesh;
        let (ranks, nodes) = (self.mesh.world(), self.nodes);
        if ranks > 1 {
            let machines = if nodes == 1 { "node" } else { "nodes" };
            writeln!(f, "{ranks} ranks on {nodes} {machines}: {data} data x {tensor} tensor x {pipeline} pipeline\n")?;
        }
        if !ranks.div_ceil(nodes.max(1)).is_multiple_of(tensor.max(1)) {
            writeln!(f, "tensor-parallel groups span several nodes and will be slow\n")?;
        }
        let with_files = self.file_bytes() > 0;
        let row = |table: &mut Table, what: &str, bytes: u64, file_bytes: u64| {
            let mut cells = vec![what.to_owned(), mebibytes(bytes)];
            if with_files {
                cells.push(mebibytes(file_bytes));
            }
            table.row(cells);
        };
        let whose = if ranks > 1 { "memory of a rank" } else { "memory" };
        let mut table = Table::new([whose, "MiB", if with_files { "in files" } else { "" }]);
        for Held { what, bytes, file_bytes, phase: _ } in &self.held {
            row(&mut table, what, *bytes, *file_bytes);
        }
        // What one model or generation needs while it is at work, the others do not need then.
        row(&mut table, "about, at any one time", self.memory_bytes(), self.file_bytes());
        table.fmt(f)?;
        if self.sent.is_empty() {
            return Ok(());
        }
        let mut table = Table::new([&format!("sent by a rank in {}, at most", self.round), "MiB"]);
        for Sent { what, bytes } in &self.sent {
            table.row([what.clone(), mebibytes(*bytes)]);
        }
        table.row(["about".to_owned(), mebibytes(self.sent_bytes())]);
        write!(f, "\n{table}")
    }
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / f64::from(1 << 20))
}

#[cfg(test)]
mod tests;
