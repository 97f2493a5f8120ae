//! Between the whole layout, in which models are stored, and the layout in pieces, in which they are computed.

use std::sync::Arc;

use super::layout::{columns, row_parts};
use super::{Content, Cut, Shard, UnitBuffer, UnitLayout};
use crate::model::spec::ModelSpec;
use crate::{Error, Result};

/// Elements that lie together in both layouts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First element in the whole layout.
    pub whole: usize,
    /// First element in the layout in pieces.
    pub here: usize,
    /// Elements.
    pub len: usize,
}

impl UnitLayout {
    /// Where the elements of this layout lie in the whole one. Padding lies nowhere.
    pub fn runs(&self, spec: &ModelSpec, content: impl Into<Content>) -> Vec<Run> {
        let whole = UnitLayout::of(spec, content, self.id);
        if self.cut.pieces == 1 {
            return vec![Run { whole: 0, here: 0, len: self.len() }];
        }
        let mut runs = Vec::new();
        for slot in &self.params {
            let Some(source) = whole.slot(slot.name) else { continue };
            let width: usize = source.shape[1..].iter().product();
            let Some(index) = slot.piece else {
                runs.push(Run { whole: source.offset, here: slot.offset, len: slot.len() });
                continue;
            };
            let piece = self.cut.piece(spec, index);
            let mut here = slot.offset;
            if slot.shard == Shard::Rows {
                for rows in row_parts(slot.name, spec, &piece) {
                    let len = rows.len() * width;
                    runs.push(Run { whole: source.offset + rows.start * width, here, len });
                    here += len;
                }
            } else {
                let columns = columns(slot.name, spec, &piece);
                for row in 0..source.shape[0] {
                    let whole = source.offset + row * width + columns.start;
                    runs.push(Run { whole, here, len: columns.len() });
                    here += columns.len();
                }
            }
        }
        runs.retain(|run| run.len > 0);
        runs
    }
}

/// What is held under `cut` of a unit in the whole layout.
///
/// # Errors
/// If the buffer is not in the whole layout or the memory cannot be had.
pub fn from_whole(spec: &ModelSpec, content: impl Into<Content>, unit: &UnitBuffer, cut: &Cut) -> Result<UnitBuffer> {
    if *cut == Cut::none() {
        return Ok(unit.clone());
    }
    let content = content.into();
    let layout = Arc::new(UnitLayout::cut(spec, &content, unit.layout().id, cut));
    let mut flat = vec![0f32; layout.len()];
    tandem_kernels::slice::with_slice(unit.flat(), |values| {
        for Run { whole, here, len } in layout.runs(spec, &content) {
            flat[here..here + len].copy_from_slice(&values[whole..whole + len]);
        }
    })?;
    UnitBuffer::from_vec(&layout, flat)
}

/// The whole layout of a unit of which all pieces are held.
///
/// # Errors
/// If some piece is not held or the memory cannot be had.
pub fn to_whole(spec: &ModelSpec, content: impl Into<Content>, unit: &UnitBuffer) -> Result<UnitBuffer> {
    let content = content.into();
    let layout = unit.layout();
    if layout.cut == Cut::none() {
        return Ok(unit.clone());
    }
    let whole = Arc::new(UnitLayout::of(spec, &content, layout.id));
    if !layout.cut.is_whole() {
        return Err(Error::BufferLength { unit: layout.id, expected: whole.len(), got: layout.len() });
    }
    let mut flat = vec![0f32; whole.len()];
    tandem_kernels::slice::with_slice(unit.flat(), |values| {
        for Run { whole, here, len } in layout.runs(spec, &content) {
            flat[whole..whole + len].copy_from_slice(&values[here..here + len]);
        }
    })?;
    UnitBuffer::from_vec(&whole, flat)
}
