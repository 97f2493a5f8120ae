//! What a run will hold in memory: for `--dry-run`.

use std::fmt;

use tandem_engine::generate::CacheSize;
use tandem_engine::model::spec::ModelSpec;
use tandem_engine::model::unit::{Head, UnitLayout};

use crate::monitor::Table;

/// Bytes of an f32.
const F32: u64 = 4;

/// An estimate of what the models of a stage take, by part.
#[derive(Debug, Clone, Default)]
pub struct Memory {
    parts: Vec<(String, u64)>,
}

impl Memory {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a model that only computes: a reference, a reward model.
    #[must_use]
    pub fn frozen(self, name: &str, spec: &ModelSpec, head: Head) -> Self {
        let parameters = parameters(spec, head);
        self.part(format!("{name}: {parameters} parameters, weights"), F32 * parameters)
    }

    /// Adds a model that is trained, `tokens` tokens in a forward pass.
    #[must_use]
    pub fn trained(self, name: &str, spec: &ModelSpec, head: Head, tokens: usize, recompute: bool) -> Self {
        let parameters = parameters(spec, head);
        self.frozen(name, spec, head)
            .part(format!("{name}: gradients"), F32 * parameters)
            .part(format!("{name}: optimizer moments"), 2 * F32 * parameters)
            .part(format!("{name}: activations of {tokens} tokens"), activation_bytes(spec, tokens, recompute))
    }

    /// Adds the key-value cache of generation.
    #[must_use]
    pub fn cache(self, spec: &ModelSpec, size: CacheSize) -> Self {
        let what = format!("cache of {} sequences of {} tokens", size.slots, size.max_len);
        self.part(what, size.bytes(spec) as u64)
    }

    /// Bytes in all.
    pub fn total(&self) -> u64 {
        self.parts.iter().map(|(_, bytes)| bytes).sum()
    }

    fn part(mut self, what: String, bytes: u64) -> Self {
        self.parts.push((what, bytes));
        self
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new(["memory", "MiB"]);
        for (what, bytes) in &self.parts {
            table.row([what.clone(), mebibytes(*bytes)]);
        }
        table.row(["about".to_owned(), mebibytes(self.total())]);
        table.fmt(f)
    }
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / f64::from(1 << 20))
}

fn parameters(spec: &ModelSpec, head: Head) -> u64 {
    UnitLayout::all(spec, head).iter().map(|layout| layout.len() as u64).sum()
}

/// What a forward keeps for its backward: per block the inputs of its norms, branches and linear maps; with recomputation
/// only the block's input, and all of one block at a time.
fn activation_bytes(spec: &ModelSpec, tokens: usize, recompute: bool) -> u64 {
    let attended = spec.heads * spec.head_dim;
    let block = 4 * spec.hidden + spec.qkv_width() + attended + spec.heads + spec.up_width() + spec.mlp_width;
    let kept = if recompute { spec.layers * spec.hidden + block } else { spec.layers * block };
    // The backward of a block holds about as much again as its forward has kept of it.
    F32 * (tokens * (kept + block)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::NewModelConfig;

    #[test]
    fn a_trained_model_holds_four_times_its_weights() {
        let spec = NewModelConfig::default().spec(1000);
        let weights = Memory::new().frozen("a", &spec, Head::Language).total();
        let model = tandem_engine::Model::initial(spec.clone(), Head::Language, 0).unwrap();
        assert_eq!(weights, 4 * model.parameters() as u64);
        let trained = |recompute| Memory::new().trained("a", &spec, Head::Language, 64, recompute).total();
        assert!(trained(true) > 4 * weights && trained(true) < trained(false));
    }
}
