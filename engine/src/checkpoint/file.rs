//! Unit buffers as one safetensors file: a flat f32 tensor per unit, and the step in the metadata.

use std::io::{self, Write};
use std::sync::Arc;

use safetensors::{Dtype, SafeTensors};

use crate::model::unit::{UnitBuffer, UnitLayout};

const STEP: &str = "step";

/// Writes the units without a second copy of them in memory.
pub(super) fn write(units: &[UnitBuffer], step: u64, file: &mut impl Write) -> io::Result<()> {
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), serde_json::json!({ STEP: step.to_string() }));
    let mut offset = 0;
    for unit in units {
        let len = unit.layout().len();
        let entry = serde_json::json!({ "dtype": "F32", "shape": [len], "data_offsets": [offset, offset + 4 * len] });
        header.insert(unit.layout().id.to_string(), entry);
        offset += 4 * len;
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    let mut bytes = Vec::with_capacity(4 * CHUNK);
    for unit in units {
        let values = unit.flat().to_vec1::<f32>().map_err(io::Error::other)?;
        for chunk in values.chunks(CHUNK) {
            bytes.clear();
            bytes.extend(chunk.iter().flat_map(|value| value.to_le_bytes()));
            file.write_all(&bytes)?;
        }
    }
    Ok(())
}

/// Elements converted at a time.
const CHUNK: usize = 1 << 18;

/// Reads the units of `layouts` and the step; the reason if the bytes hold anything else.
pub(super) fn read(bytes: &[u8], layouts: &[Arc<UnitLayout>]) -> Result<(Vec<UnitBuffer>, u64), String> {
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| error.to_string())?;
    let step = metadata.metadata().as_ref().and_then(|map| map.get(STEP)).and_then(|step| step.parse().ok());
    let step = step.ok_or("its metadata names no step")?;
    let tensors = SafeTensors::deserialize(bytes).map_err(|error| error.to_string())?;
    if tensors.len() != layouts.len() {
        return Err(format!("it holds {} units, the model has {}", tensors.len(), layouts.len()));
    }
    let units = layouts.iter().map(|layout| {
        let name = layout.id.to_string();
        let tensor = tensors.tensor(&name).map_err(|error| format!("unit {name}: {error}"))?;
        if tensor.dtype() != Dtype::F32 {
            return Err(format!("unit {name} is {:?}, not F32", tensor.dtype()));
        }
        let values = tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        UnitBuffer::from_vec(layout, values).map_err(|error| error.to_string())
    });
    Ok((units.collect::<Result<_, _>>()?, step))
}
