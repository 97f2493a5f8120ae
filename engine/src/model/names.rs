//! Which tensor of a model file is which rows of which parameter: tables of names, and nothing else.
//!
//! A table speaks of *stems*, the names of parameters without `.weight` or `.bias`: what holds for a weight holds for its
//! bias.

use std::collections::HashMap;
use std::sync::Arc;

use super::spec::{Family, ModelSpec};
use super::unit::{Head, UnitId, UnitLayout};
use crate::{Error, Result};

/// One tensor of a model file and where it lies in a unit.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorMap {
    /// Name in the file.
    pub name: String,
    /// The unit that holds it.
    pub unit: UnitId,
    /// The parameter that holds it, whole or in part.
    pub param: &'static str,
    /// Which part of the parameter it is.
    pub part: Part,
    /// First row (output) of the parameter.
    pub first_row: usize,
    /// Number of rows (outputs).
    pub rows: usize,
    /// Whether the file has inputs before outputs (GPT-2's `Conv1D`).
    pub transposed: bool,
    /// Shape in the file.
    pub shape: Vec<usize>,
}

/// The part of a fused parameter that a tensor of a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// All of it.
    Whole,
    /// The query rows of the fused projection.
    Query,
    /// The key rows.
    Key,
    /// The value rows.
    Value,
    /// The gate rows of the fused first MLP projection.
    Gate,
    /// The rows that the gate multiplies.
    Up,
}

impl Part {
    /// First row and number of rows in a parameter of `all` rows.
    pub(crate) fn range(self, spec: &ModelSpec, all: usize) -> (usize, usize) {
        let (query, key) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        match self {
            Part::Whole => (0, all),
            Part::Query => (0, query),
            Part::Key => (query, key),
            Part::Value => (query + key, key),
            Part::Gate => (0, spec.mlp_width),
            Part::Up => (spec.mlp_width, spec.mlp_width),
        }
    }
}

/// The names of one file format.
#[derive(Debug)]
pub(crate) struct NameTable {
    /// What stands before every name but the heads'; folders that hold a bare base model lack it.
    pub(crate) prefix: &'static str,
    /// What stands before a block's number, the prefix included.
    pub(crate) blocks: &'static str,
    /// Stems outside the blocks: ours, the file's.
    pub(crate) ends: &'static [(&'static str, &'static str)],
    /// Stems in a block: ours, which part of it, the file's.
    pub(crate) block: &'static [(&'static str, Part, &'static str)],
    /// Whether the matrices of the blocks are stored inputs first.
    pub(crate) inputs_first: bool,
    /// Ends of the names of buffers that old versions stored and that are no parameters.
    pub(crate) buffers: &'static [&'static str],
}

impl NameTable {
    /// Maps every parameter of a model, in the order of its units.
    ///
    /// # Errors
    /// If the format has no name for a parameter of the spec.
    pub(crate) fn tensors(&self, layouts: &[Arc<UnitLayout>], spec: &ModelSpec) -> Result<Vec<TensorMap>> {
        let mut maps = Vec::new();
        for layout in layouts {
            for slot in &layout.params {
                let (stem, kind) = slot.name.rsplit_once('.').unwrap_or((slot.name, "weight"));
                let before = maps.len();
                for (part, name) in self.names(layout.id, stem) {
                    let (first_row, rows) = part.range(spec, slot.shape[0]);
                    let transposed = self.inputs_first && slot.shape.len() == 2 && layout.id != UnitId::Ends;
                    let mut shape = slot.shape.clone();
                    shape[0] = rows;
                    if transposed {
                        shape.reverse();
                    }
                    let name = format!("{name}.{kind}");
                    let (unit, param) = (layout.id, slot.name);
                    maps.push(TensorMap { name, unit, param, part, first_row, rows, transposed, shape });
                }
                if maps.len() == before {
                    return Err(Error::NoName { family: spec.family, param: slot.name });
                }
            }
        }
        Ok(maps)
    }

    /// The file's stems for one of ours.
    fn names(&self, unit: UnitId, stem: &str) -> Vec<(Part, String)> {
        match unit {
            UnitId::Ends => {
                let named = self.ends.iter().filter(|(ours, _)| *ours == stem);
                named.map(|(_, theirs)| (Part::Whole, (*theirs).to_string())).collect()
            }
            UnitId::Block(index) => {
                let named = self.block.iter().filter(|(ours, _, _)| *ours == stem);
                named.map(|(_, part, theirs)| (*part, format!("{}{index}.{theirs}", self.blocks))).collect()
            }
        }
    }

    /// Whether a tensor that no parameter wants may be left aside: a stored buffer, or a language head that is the
    /// embedding itself or that a scalar head replaces.
    pub(crate) fn ignorable(&self, name: &str, spec: &ModelSpec, head: Head) -> bool {
        let spare_head = spec.tied || head == Head::Scalar;
        let is_head =
            || self.ends.iter().any(|(ours, theirs)| *ours == "head" && name.strip_suffix(".weight") == Some(theirs));
        (spare_head && is_head()) || self.buffers.iter().any(|end| name.ends_with(end))
    }
}

/// Tensors wanted and tensors found, put together by name.
#[derive(Debug)]
pub(crate) struct Matched {
    /// For each wanted tensor, the index of the found one.
    pub(crate) found: Vec<Option<usize>>,
    /// Wanted but not there.
    pub(crate) missing: Vec<String>,
    /// There but not wanted.
    pub(crate) unexpected: Vec<String>,
    /// There with another shape.
    pub(crate) misshaped: Vec<String>,
}

impl Matched {
    /// Looks for every map among `(name, shape)`; a name may lack the table's prefix.
    pub(crate) fn new(
        table: &NameTable,
        maps: &[TensorMap],
        found: &[(&str, &[usize])],
        ignorable: impl Fn(&str) -> bool,
    ) -> Self {
        let wanted: HashMap<&str, usize> = maps.iter().enumerate().map(|(at, map)| (map.name.as_str(), at)).collect();
        let mut matched = Matched {
            found: vec![None; maps.len()],
            missing: Vec::new(),
            unexpected: Vec::new(),
            misshaped: Vec::new(),
        };
        for (index, &(name, shape)) in found.iter().enumerate() {
            let known = wanted.get(name).or_else(|| wanted.get(format!("{}{name}", table.prefix).as_str()));
            match known {
                Some(&at) if matched.found[at].is_none() => {
                    matched.found[at] = Some(index);
                    if maps[at].shape != shape {
                        matched.misshaped.push(format!("{name} {shape:?} instead of {:?}", maps[at].shape));
                    }
                }
                None if ignorable(name) => {}
                _ => matched.unexpected.push(name.to_string()),
            }
        }
        let lacking = maps.iter().zip(&matched.found).filter(|(_, found)| found.is_none());
        matched.missing = lacking.map(|(map, _)| map.name.clone()).collect();
        matched
    }

    /// Whether every tensor is there with its shape and nothing is left over.
    pub(crate) fn is_complete(&self) -> bool {
        self.missing.is_empty() && self.unexpected.is_empty() && self.misshaped.is_empty()
    }
}

impl std::fmt::Display for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Family::Llama => "llama",
            Family::Mistral => "mistral",
            Family::Qwen2 => "qwen2",
            Family::Gpt2 => "gpt2",
            Family::Opt => "opt",
        })
    }
}
