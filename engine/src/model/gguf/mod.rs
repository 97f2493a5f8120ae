//! GGUF, the format of llama.cpp: weights, often quantised, with the tokenizer in one file.
//!
//! Quantised weights are turned into f32 as they are read. llama.cpp rotates pairs of neighbouring coordinates and therefore
//! stores the rows of a Llama's q and k in another order; they are put back here. (A model with the rows left as they are
//! loads and talks nonsense.)

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::Device;

use super::Blueprint;
use super::families::{self, Part, TensorMap};
use super::import::fill::{Place, check_finite, rows_mut};
use super::import::{Opened, sources};
use super::names::{Matched, NameTable};
use super::spec::{Family, ModelSpec};
use super::unit::{Head, SCORE, UnitBuffer, UnitLayout};
use crate::{Error, Result};
pub use tokenizer::{GgufTokenizer, tokenizer};

mod metadata;
mod tokenizer;

const ENDS: &[(&str, &str)] = &[
    ("embedding", "token_embd"),
    ("positions", "position_embd"),
    ("norm", "output_norm"),
    ("head", "output"),
    ("score", "score"),
];

/// Llama and its kin.
static GATED: NameTable = NameTable {
    prefix: "",
    blocks: "blk.",
    ends: ENDS,
    block: &[
        ("qkv", Part::Query, "attn_q"),
        ("qkv", Part::Key, "attn_k"),
        ("qkv", Part::Value, "attn_v"),
        ("output", Part::Whole, "attn_output"),
        ("up", Part::Gate, "ffn_gate"),
        ("up", Part::Up, "ffn_up"),
        ("down", Part::Whole, "ffn_down"),
        ("norm1", Part::Whole, "attn_norm"),
        ("norm2", Part::Whole, "ffn_norm"),
    ],
    inputs_first: false,
    buffers: &[],
};

/// GPT-2, whose matrices GGUF stores outputs first.
static PLAIN: NameTable = NameTable {
    prefix: "",
    blocks: "blk.",
    ends: ENDS,
    block: &[
        ("qkv", Part::Whole, "attn_qkv"),
        ("output", Part::Whole, "attn_output"),
        ("up", Part::Whole, "ffn_up"),
        ("down", Part::Whole, "ffn_down"),
        ("norm1", Part::Whole, "attn_norm"),
        ("norm2", Part::Whole, "ffn_norm"),
    ],
    inputs_first: false,
    buffers: &[],
};

/// Opens the GGUF file `path`; a scalar head starts at zero, for the format has none.
pub(super) fn open(path: &Path, head: Head) -> Result<Opened> {
    let file = metadata::Head::read(path)?;
    let config = file.config()?;
    let spec = families::read_spec(path, &config)?;
    let names = if spec.gated { &GATED } else { &PLAIN };
    let mut maps = names.tensors(&families::layouts(&spec, head), &spec)?;
    maps.retain(|map| map.param != SCORE);
    let mut found: Vec<(&str, &[usize])> =
        file.content.tensor_infos.iter().map(|(name, info)| (name.as_str(), info.shape.dims())).collect();
    found.sort_unstable();
    let matched = Matched::new(names, &maps, &found, |name| names.ignorable(name, &spec, head));
    let sources = sources(path, matched)?;
    let stored: Vec<String> = sources.into_iter().map(|index| found[index].0.to_string()).collect();
    // The file has one place that it is read from.
    let (file, shape) = (Mutex::new(file), spec.clone());
    let blueprint = Blueprint::new(spec, head, move |layout| {
        load_unit(&file.lock().unwrap_or_else(PoisonError::into_inner), layout, &shape, &maps, &stored)
    });
    Ok(Opened { blueprint, config, reward_scale: None, missing_score: head == Head::Scalar })
}

fn load_unit(
    file: &metadata::Head,
    layout: &Arc<UnitLayout>,
    spec: &ModelSpec,
    maps: &[TensorMap],
    stored: &[String],
) -> Result<UnitBuffer> {
    let mut flat = vec![0f32; layout.len()];
    for (index, map) in families::of_unit(maps, layout.id) {
        let mut values = dequantise(file, &stored[index])?;
        check_finite(&file.path, &stored[index], &values)?;
        if spec.family == Family::Llama {
            match map.part {
                Part::Query => values = half_split(&values, spec.heads, spec.head_dim),
                Part::Key => values = half_split(&values, spec.kv_heads, spec.head_dim),
                _ => {}
            }
        }
        let Some(rows) = rows_mut(&mut flat, layout, map) else {
            return Err(Error::NoParameter { unit: map.unit, name: map.param.to_string() });
        };
        Place::new(map, rows).put(0, &values);
    }
    UnitBuffer::from_vec(layout, flat)
}

/// Reads one tensor as f32.
fn dequantise(file: &metadata::Head, name: &str) -> Result<Vec<f32>> {
    let read = || -> candle_core::Result<Vec<f32>> {
        let tensor = file.content.tensor(&mut &file.file, name, &Device::Cpu)?;
        tensor.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1()
    };
    let wrong = |reason: String| Error::model_file(&file.path, reason, "get the file anew");
    // The blocks of a quantised tensor come from the file; the library is not trusted with every one of them.
    match catch_unwind(AssertUnwindSafe(read)) {
        Ok(Ok(values)) => Ok(values),
        Ok(Err(error)) => Err(wrong(format!("{name} cannot be read: {error}"))),
        Err(_) => Err(wrong(format!("{name} cannot be decoded"))),
    }
}

/// Rows of `heads` heads from the order of interleaved pairs `(0, 1) (2, 3) …` to that of halves: row `2i + p` of a head
/// goes to row `p D/2 + i`.
fn half_split(values: &[f32], heads: usize, head_dim: usize) -> Vec<f32> {
    let width = values.len() / (heads * head_dim);
    let mut split = Vec::with_capacity(values.len());
    for head in values.chunks_exact(head_dim * width) {
        for part in 0..2 {
            for row in (part..head_dim).step_by(2) {
                split.extend_from_slice(&head[row * width..(row + 1) * width]);
            }
        }
    }
    split
}
