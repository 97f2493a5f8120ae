//! Units as one safetensors file: a flat f32 tensor per unit in the whole layout, and the step in the metadata.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;
use safetensors::tensor::Metadata;
use safetensors::{Dtype, SafeTensors};
use tandem_kernels::slice::with_slice;

use crate::model::unit::{UnitBuffer, UnitLayout};

const STEP: &str = "step";

/// The bytes before the data of a file that holds units of these layouts.
pub(super) fn header(layouts: &[Arc<UnitLayout>], step: u64) -> io::Result<Vec<u8>> {
    let tensors = layouts.iter().map(|layout| (layout.id.to_string(), layout.len()));
    header_of(serde_json::json!({ STEP: step.to_string() }), tensors)
}

/// The bytes before the data of a file of flat f32 tensors: their names and lengths.
pub(super) fn header_of(
    metadata: serde_json::Value,
    tensors: impl IntoIterator<Item = (String, usize)>,
) -> io::Result<Vec<u8>> {
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), metadata);
    let mut offset = 0;
    for (name, len) in tensors {
        let entry = serde_json::json!({ "dtype": "F32", "shape": [len], "data_offsets": [offset, offset + 4 * len] });
        header.insert(name, entry);
        offset += 4 * len;
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut header);
    Ok(bytes)
}

/// Writes the elements of one unit without a second copy of them in memory.
pub(super) fn write_unit(unit: &UnitBuffer, file: &mut impl Write) -> io::Result<()> {
    let written = with_slice(unit.flat(), |values| {
        let mut bytes = Vec::with_capacity(4 * CHUNK);
        for chunk in values.chunks(CHUNK) {
            bytes.clear();
            crate::parallel::bytes::append(chunk, &mut bytes);
            file.write_all(&bytes)?;
        }
        Ok(())
    });
    written.map_err(io::Error::other)?
}

/// Elements converted at a time.
pub(super) const CHUNK: usize = 1 << 18;

/// A file that is read unit by unit, as they are asked for.
pub(super) struct UnitFile {
    map: Mmap,
    metadata: Metadata,
    data: usize,
    layouts: Vec<Arc<UnitLayout>>,
    /// The step that it is of.
    pub(super) step: u64,
}

impl UnitFile {
    /// Opens the file `path` of units of `layouts`; the reason if it holds anything else.
    pub(super) fn open(path: &Path, layouts: Vec<Arc<UnitLayout>>) -> Result<Self, String> {
        let file = File::open(path).map_err(|error| error.to_string())?;
        // SAFETY: published checkpoints are never written to, and the run's lock keeps other processes from removing them.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| error.to_string())?;
        let (size, metadata) = SafeTensors::read_metadata(&map).map_err(|error| error.to_string())?;
        let step = metadata.metadata().as_ref().and_then(|map| map.get(STEP)).and_then(|step| step.parse().ok());
        let step = step.ok_or("its metadata names no step")?;
        let tensors = metadata.tensors();
        if tensors.len() != layouts.len() {
            return Err(format!("it holds {} units, the model has {}", tensors.len(), layouts.len()));
        }
        for layout in &layouts {
            let name = layout.id.to_string();
            let info = tensors.get(&name).ok_or_else(|| format!("unit {name} is missing"))?;
            if info.dtype != Dtype::F32 {
                return Err(format!("unit {name} is {:?}, not F32", info.dtype));
            }
            if info.shape != [layout.len()] {
                return Err(format!("unit {name} has the shape {:?} instead of [{}]", info.shape, layout.len()));
            }
        }
        Ok(Self { data: size + 8, map, metadata, layouts, step })
    }

    /// The unit `index` in the whole layout.
    pub(super) fn unit(&self, index: usize) -> Result<UnitBuffer, String> {
        let layout = &self.layouts[index];
        let info = self.metadata.info(&layout.id.to_string()).ok_or("a unit is missing")?;
        let (start, end) = info.data_offsets;
        let bytes = self.map.get(self.data + start..self.data + end).ok_or("it is cut off")?;
        let mut values = vec![0f32; layout.len()];
        crate::parallel::bytes::fill(&mut values, bytes);
        UnitBuffer::from_vec(layout, values).map_err(|error| error.to_string())
    }
}
