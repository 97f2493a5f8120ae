//! Bytes of a file to rows of a flat buffer, a chunk at a time.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use super::header::{Dtype, Stored};
use crate::model::names::TensorMap;
use crate::model::unit::UnitLayout;
use crate::{Error, Result};

/// Elements that are read at once: what a thread holds beside the weights.
const CHUNK: usize = 1 << 18;

/// Reads one stored tensor into its rows of the unit's flat buffer.
///
/// # Errors
/// If the file cannot be read, the tensor is of a type that weights are not, or it holds a number that is not finite.
pub(crate) fn fill(
    flat: &mut [f32],
    layout: &UnitLayout,
    map: &TensorMap,
    path: &Path,
    file: &File,
    stored: &Stored,
) -> Result<()> {
    let Some(rows) = rows_mut(flat, layout, map) else {
        return Err(Error::NoParameter { unit: map.unit, name: map.param.to_string() });
    };
    let read = |first: usize, values: &mut [f32]| -> Result<()> {
        let size = stored.dtype.size();
        let mut bytes = vec![0u8; values.len() * size as usize];
        file.read_exact_at(&mut bytes, stored.start + first as u64 * size).map_err(|error| Error::io(path, error))?;
        if !decode(stored.dtype, &bytes, values) {
            let reason = format!("{} is neither f32, f16 nor bf16", stored.name);
            return Err(Error::model_file(path, reason, "convert the model to one of them"));
        }
        check_finite(path, &stored.name, values)
    };
    if !map.transposed {
        // In parallel, but with the error of the first chunk that has one, so that it does not depend on timing.
        let chunks = rows.par_chunks_mut(CHUNK).enumerate();
        let read: Vec<Result<()>> = chunks.map(|(chunk, values)| read(chunk * CHUNK, values)).collect();
        return read.into_iter().collect();
    }
    let mut values = vec![0f32; CHUNK.min(rows.len())];
    let mut place = Place::new(map, rows);
    for first in (0..place.len()).step_by(CHUNK) {
        let values = &mut values[..CHUNK.min(place.len() - first)];
        read(first, values)?;
        place.put(first, values);
    }
    Ok(())
}

/// The rows of a flat buffer that a tensor fills; `None` if the layout has no such parameter.
pub(crate) fn rows_mut<'a>(flat: &'a mut [f32], layout: &UnitLayout, map: &TensorMap) -> Option<&'a mut [f32]> {
    let slot = layout.slot(map.param)?;
    let width: usize = slot.shape[1..].iter().product();
    let start = slot.offset + map.first_row * width;
    flat.get_mut(start..start + map.rows * width)
}

/// Refuses a tensor with a number that is not finite.
pub(crate) fn check_finite(path: &Path, name: &str, values: &[f32]) -> Result<()> {
    match values.iter().find(|value| !value.is_finite()) {
        None => Ok(()),
        Some(value) => Err(Error::model_file(
            path,
            format!("{name} holds {value}: the model is broken"),
            "take an earlier checkpoint of it, or get it anew",
        )),
    }
}

/// Where the elements of a tensor go, in the file's order.
pub(crate) struct Place<'a> {
    rows: &'a mut [f32],
    /// Outputs, if the file has inputs first.
    outputs: Option<usize>,
}

impl<'a> Place<'a> {
    /// The place of a tensor whose rows are `rows`.
    pub(crate) fn new(map: &TensorMap, rows: &'a mut [f32]) -> Self {
        Self { rows, outputs: map.transposed.then_some(map.rows) }
    }

    /// Number of elements.
    fn len(&self) -> usize {
        self.rows.len()
    }

    /// Puts the elements from `first` on.
    pub(crate) fn put(&mut self, first: usize, values: &[f32]) {
        match self.outputs {
            None => self.rows[first..first + values.len()].copy_from_slice(values),
            Some(outputs) => {
                let inputs = self.rows.len() / outputs;
                for (index, &value) in (first..).zip(values) {
                    self.rows[index % outputs * inputs + index / outputs] = value;
                }
            }
        }
    }
}

/// Decodes little-endian elements; false if weights cannot be of that type.
fn decode(dtype: Dtype, bytes: &[u8], values: &mut [f32]) -> bool {
    match dtype {
        Dtype::F32 => {
            for (value, four) in values.iter_mut().zip(bytes.as_chunks().0) {
                *value = f32::from_le_bytes(*four);
            }
        }
        Dtype::Bf16 => {
            for (value, two) in values.iter_mut().zip(bytes.as_chunks().0) {
                *value = bf16::from_le_bytes(*two).to_f32();
            }
        }
        Dtype::F16 => {
            let halves: Vec<f16> = bytes.as_chunks().0.iter().map(|two| f16::from_le_bytes(*two)).collect();
            halves.convert_to_f32_slice(values);
        }
        Dtype::Other(_) => return false,
    }
    true
}
