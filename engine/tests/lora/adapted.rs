//! Models of every family with adapters that do something.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tandem_engine::model::import::load;
use tandem_engine::model::spec::ModelSpec;
use tandem_engine::model::unit::{Content, Head, UnitBuffer, UnitLayout};
use tandem_engine::parallel::Placement;
use tandem_engine::{LoraConfig, Model, Packed, Result};
use tandem_kernels::rng::{Philox, Purpose};

/// Folders with small models of every family, made by transformers.
pub(crate) const FAMILIES: [&str; 7] = ["llama", "llama-tied", "mistral", "qwen2", "gpt2", "opt", "opt-350m"];

pub(crate) fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name)
}

pub(crate) fn base(name: &str) -> Model {
    load(&golden(name), Head::Language).unwrap().into_model().unwrap().0
}

pub(crate) fn config(rank: usize, dropout: f32) -> LoraConfig {
    LoraConfig { rank, alpha: 2.0 * rank as f64, dropout, targets: Vec::new() }
}

/// Adapters as after some training: neither matrix is zero.
pub(crate) fn unit(spec: &ModelSpec, head: Head, config: &LoraConfig, index: usize) -> Result<UnitBuffer> {
    let content = Content::Adapters(Arc::new(config.resolve(spec, head)?));
    let layout = Arc::new(UnitLayout::all(spec, content).swap_remove(index));
    let mut flat = vec![0f32; layout.len()];
    let philox = Philox::new(3, Purpose::Init, index as u64);
    for (number, slot) in layout.params.iter().enumerate() {
        let range = slot.offset..slot.offset + slot.len();
        philox.fill_normal(number as u64, 0, 0.1, &mut flat[range]);
    }
    UnitBuffer::from_vec(&layout, flat)
}

/// `base`, in its place, with adapters that do something.
pub(crate) fn adapted(base: Model, config: &LoraConfig, placement: &Placement) -> Result<Model> {
    let (spec, head) = (base.spec().clone(), base.head());
    base.with_adapters(config, placement, |index| unit(&spec, head, config, index))
}

/// Rows of unequal lengths, and labels for all tokens but the last of each.
pub(crate) fn batch(vocabulary: usize, lengths: &[usize]) -> (Packed, Vec<u32>, Vec<u32>) {
    let philox = Philox::new(5, Purpose::Init, 0);
    let mut batch = Packed::new();
    let (mut rows, mut labels) = (Vec::new(), Vec::new());
    for (index, &length) in lengths.iter().enumerate() {
        let start = batch.tokens() as u32;
        let id = |at: usize| philox.below(vocabulary as u64, index as u64, at as u32, 0) as u32;
        let ids: Vec<u32> = (0..length).map(id).collect();
        batch.push(&ids, index as u64);
        rows.extend(start..start + length as u32 - 1);
        labels.extend_from_slice(&ids[1..]);
    }
    (batch, rows, labels)
}

pub(crate) fn bits(unit: &UnitBuffer) -> Vec<u32> {
    unit.flat().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

/// The bits of what `bring` brings of every unit; empty on all ranks but the first.
pub(crate) fn all_bits(model: &Model, bring: impl Fn(usize) -> Result<Option<UnitBuffer>>) -> Vec<u32> {
    (0..=model.spec().layers).filter_map(|index| bring(index).unwrap()).flat_map(|unit| bits(&unit)).collect()
}
