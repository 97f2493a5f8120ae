//! Export: units become a folder that transformers, vLLM and llama.cpp's converter load.
//!
//! Same weights, same bytes: tensors are written in the order of their names, so that a folder imported and exported again in
//! its own element type is the same to the bit. Weights are written in chunks, never copied whole.

use std::io::Write;
use std::path::Path;

use candle_core::{CpuStorage, Storage};
use half::{bf16, f16};
use serde_json::{Map, Value, json};
use tandem_store::{StagedFile, Staging};

use super::Model;
use super::families::{self, RewardScale, TensorMap};
use super::import::fill::check_finite;
use super::unit::{Head, UnitBuffer};
use crate::{Error, Result};

/// Elements that are encoded at once.
const CHUNK: usize = 1 << 18;
/// Largest file of weights by default, in bytes: what transformers makes too.
const SHARD_BYTES: u64 = 5_000_000_000;

/// Element type of exported weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum ExportDtype {
    /// Exact.
    #[default]
    F32,
    /// Rounded to nearest even; half the bytes.
    Bf16,
    /// Rounded to nearest even; weights beyond ±65,504 are an error.
    F16,
}

impl ExportDtype {
    /// Its name in a safetensors header.
    fn code(self) -> &'static str {
        match self {
            ExportDtype::F32 => "F32",
            ExportDtype::Bf16 => "BF16",
            ExportDtype::F16 => "F16",
        }
    }

    /// Its name in a `config.json`.
    fn name(self) -> &'static str {
        match self {
            ExportDtype::F32 => "float32",
            ExportDtype::Bf16 => "bfloat16",
            ExportDtype::F16 => "float16",
        }
    }

    fn size(self) -> u64 {
        match self {
            ExportDtype::F32 => 4,
            ExportDtype::Bf16 | ExportDtype::F16 => 2,
        }
    }
}

/// Ids that a generator needs to know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialIds {
    /// First token of a text.
    pub bos: Option<u32>,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
    /// What others fill batches with; transformers' reward models need it to find the last token of each row.
    pub pad: Option<u32>,
}

/// How to write a folder.
#[derive(Clone, Debug, PartialEq)]
pub struct ExportOptions {
    /// Element type of the weights.
    pub dtype: ExportDtype,
    /// Largest file of weights, in bytes; a tensor larger than that has a file of its own.
    pub max_shard_bytes: u64,
    /// Mean and spread of the scores, for reward models.
    pub reward_scale: Option<RewardScale>,
    /// Ids for `config.json` and `generation_config.json`; with none given, those of the original config stay.
    pub special_ids: SpecialIds,
    /// Further fields of `generation_config.json`: how to sample.
    pub generation: Map<String, Value>,
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self {
            dtype: ExportDtype::F32,
            max_shard_bytes: SHARD_BYTES,
            reward_scale: None,
            special_ids: SpecialIds::default(),
            generation: Map::new(),
        }
    }
}

/// Writes `config.json`, `generation_config.json` and the weights of a model into a folder being staged.
///
/// `original` is the config that the model was imported with, if it was. All ranks call it together; only rank 0 of the world
/// has a `staging`, the others bring what they hold.
///
/// # Errors
/// If the family has no name for a parameter, a weight is not finite (in the element type asked for), a file cannot be
/// written, or ranks have lost each other. After an error of rank 0, all ranks have still made the same calls.
pub fn write(
    model: &Model,
    original: Option<&Value>,
    options: &ExportOptions,
    staging: Option<&mut Staging>,
) -> Result<()> {
    let mut maps = families::tensors(model.spec(), model.head())?;
    maps.sort_by(|a, b| a.name.cmp(&b.name));
    let bring = |unit| model.whole_unit(unit);
    let mut units = Units::of(&maps, &bring);
    let written = match staging {
        Some(staging) => write_folder(model, &maps, original, options, &mut units, staging),
        None => Ok(()),
    };
    // What is left to bring, everything on ranks that do not write.
    let brought = units.skip_rest();
    written.and(brought)
}

/// Units in the order in which the tensors of a folder need them, each brought to rank 0 when it is its turn.
pub(crate) struct Units<'a> {
    order: Vec<usize>,
    next: usize,
    bring: &'a dyn Fn(usize) -> Result<Option<UnitBuffer>>,
    current: Option<(usize, UnitBuffer)>,
}

/// The unit of each tensor, neighbours with the same one counted once.
fn unit_order(maps: &[TensorMap]) -> Vec<usize> {
    let mut order: Vec<usize> = maps.iter().map(|map| map.unit.index()).collect();
    order.dedup();
    order
}

impl<'a> Units<'a> {
    /// The units that `maps` need; `bring` is called on all ranks together and returns them on rank 0.
    pub(crate) fn of(maps: &[TensorMap], bring: &'a dyn Fn(usize) -> Result<Option<UnitBuffer>>) -> Self {
        Self { order: unit_order(maps), next: 0, bring, current: None }
    }

    fn get(&mut self, unit: usize) -> Result<&UnitBuffer> {
        if self.current.as_ref().is_none_or(|(current, _)| *current != unit) {
            self.current = None;
            self.next += 1;
            let layouts = self.order.len();
            let brought = (self.bring)(unit)?;
            self.current = Some((unit, brought.ok_or(Error::UnitCount { expected: layouts, got: 0 })?));
        }
        match &self.current {
            Some((_, buffer)) => Ok(buffer),
            None => Err(Error::UnitCount { expected: 1, got: 0 }),
        }
    }

    /// Brings what has not been asked for: everything on ranks that do not write.
    pub(crate) fn skip_rest(&mut self) -> Result<()> {
        for &unit in &self.order[self.next..] {
            (self.bring)(unit)?;
        }
        Ok(())
    }
}

fn write_folder(
    model: &Model,
    maps: &[TensorMap],
    original: Option<&Value>,
    options: &ExportOptions,
    units: &mut Units<'_>,
    staging: &mut Staging,
) -> Result<()> {
    let (spec, head) = (model.spec(), model.head());

    let config = families::write_config(spec, head, original, options.dtype.name(), options.reward_scale);
    let (config, generation) = with_special_ids(config, options);
    staging.write("config.json", &pretty(&config))?;
    if head == Head::Language {
        staging.write("generation_config.json", &pretty(&generation))?;
    }

    let shards = shards(maps, options);
    let names = shard_names(shards.len());
    for (name, shard) in names.iter().zip(&shards) {
        write_weights(name, shard, units, options.dtype, staging)?;
    }
    if shards.len() > 1 {
        let files: Map<String, Value> = names
            .iter()
            .zip(&shards)
            .flat_map(|(name, shard)| shard.iter().map(move |map| (map.name.clone(), json!(name))))
            .collect();
        let total: u64 = maps.iter().map(|map| bytes(map, options.dtype)).sum();
        let index = json!({ "metadata": { "total_size": total }, "weight_map": files });
        staging.write("model.safetensors.index.json", &pretty(&index))?;
    }
    Ok(())
}

/// The config with the ids in it, and the `generation_config.json` beside it.
fn with_special_ids(mut config: Value, options: &ExportOptions) -> (Value, Value) {
    let ids = &options.special_ids;
    let eos = match ids.eos.as_slice() {
        [] => Value::Null,
        [one] => json!(one),
        several => json!(several),
    };
    let mut generation = options.generation.clone();
    for (key, id) in [("bos_token_id", json!(ids.bos)), ("eos_token_id", eos), ("pad_token_id", json!(ids.pad))] {
        if !id.is_null() {
            config[key] = id;
        }
        if !config[key].is_null() {
            generation.insert(key.into(), config[key].clone());
        }
    }
    (config, Value::Object(generation))
}

pub(crate) fn pretty(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

fn bytes(map: &TensorMap, dtype: ExportDtype) -> u64 {
    map.shape.iter().product::<usize>() as u64 * dtype.size()
}

/// Cuts the tensors, in order, into files of at most the size asked for.
fn shards<'a>(maps: &'a [TensorMap], options: &ExportOptions) -> Vec<&'a [TensorMap]> {
    let mut shards = Vec::new();
    let (mut first, mut size) = (0, 0);
    for (index, map) in maps.iter().enumerate() {
        let more = bytes(map, options.dtype);
        if index > first && size + more > options.max_shard_bytes {
            shards.push(&maps[first..index]);
            (first, size) = (index, 0);
        }
        size += more;
    }
    shards.push(&maps[first..]);
    shards
}

fn shard_names(count: usize) -> Vec<String> {
    match count {
        1 => vec!["model.safetensors".into()],
        _ => (1..=count).map(|number| format!("model-{number:05}-of-{count:05}.safetensors")).collect(),
    }
}

/// Writes one safetensors file.
pub(crate) fn write_weights(
    name: &str,
    maps: &[TensorMap],
    units: &mut Units<'_>,
    dtype: ExportDtype,
    staging: &mut Staging,
) -> Result<()> {
    let path = staging.dir().join(name);
    let header = header(maps, dtype);
    let mut file = staging.create_file(name)?;
    let failed = |error| Error::io(&path, error);
    file.write_all(&(header.len() as u64).to_le_bytes()).map_err(failed)?;
    file.write_all(header.as_bytes()).map_err(failed)?;
    for map in maps {
        write_tensor(&path, map, units.get(map.unit.index())?, dtype, &mut file)?;
    }
    Ok(file.finish()?)
}

/// The header of a safetensors file, padded so that the data begin at a multiple of eight bytes.
fn header(maps: &[TensorMap], dtype: ExportDtype) -> String {
    // Written by hand because the order of the keys is part of the format's habit: metadata, then tensors as they lie.
    let mut header = String::from(r#"{"__metadata__":{"format":"pt"}"#);
    let mut start = 0;
    for map in maps {
        let end = start + bytes(map, dtype);
        let shape: Vec<String> = map.shape.iter().map(usize::to_string).collect();
        header += &format!(
            r#","{}":{{"dtype":"{}","shape":[{}],"data_offsets":[{start},{end}]}}"#,
            map.name,
            dtype.code(),
            shape.join(",")
        );
        start = end;
    }
    header.push('}');
    let padding = header.len().next_multiple_of(8) - header.len();
    header + &" ".repeat(padding)
}

/// Encodes one tensor from its rows of a unit, chunk by chunk.
fn write_tensor(
    path: &Path,
    map: &TensorMap,
    unit: &UnitBuffer,
    dtype: ExportDtype,
    file: &mut StagedFile<'_>,
) -> Result<()> {
    let lacking = || Error::NoParameter { unit: map.unit, name: map.param.to_string() };
    let slot = unit.layout().slot(map.param).ok_or_else(lacking)?;
    let width: usize = slot.shape[1..].iter().product();
    let (storage, layout) = unit.flat().storage_and_layout();
    let Storage::Cpu(CpuStorage::F32(values)) = &*storage else { return Err(lacking()) };
    let first = layout.start_offset() + slot.offset + map.first_row * width;
    let rows = &values[first..first + map.rows * width];

    let mut chunk = Vec::with_capacity(CHUNK.min(rows.len()));
    let mut encoded = Vec::with_capacity(chunk.capacity() * dtype.size() as usize);
    for start in (0..rows.len()).step_by(CHUNK) {
        let range = start..rows.len().min(start + CHUNK);
        chunk.clear();
        if map.transposed {
            chunk.extend(range.map(|index| rows[index % map.rows * width + index / map.rows]));
        } else {
            chunk.extend_from_slice(&rows[range]);
        }
        check_finite(path, &map.name, &chunk)?;
        encoded.clear();
        if !encode(&chunk, dtype, &mut encoded) {
            let reason = format!("{} holds a weight too large for {}", map.name, dtype.name());
            return Err(Error::model_file(path, reason, "export in f32"));
        }
        file.write_all(&encoded).map_err(|error| Error::io(path, error))?;
    }
    Ok(())
}

/// Appends the elements in little endian; false if one is too large for the type.
fn encode(values: &[f32], dtype: ExportDtype, bytes: &mut Vec<u8>) -> bool {
    match dtype {
        ExportDtype::F32 => {
            bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            true
        }
        ExportDtype::Bf16 => values.iter().all(|&value| {
            let half = bf16::from_f32(value);
            bytes.extend(half.to_le_bytes());
            half.is_finite()
        }),
        ExportDtype::F16 => values.iter().all(|&value| {
            let half = f16::from_f32(value);
            bytes.extend(half.to_le_bytes());
            half.is_finite()
        }),
    }
}
