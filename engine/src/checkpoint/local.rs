//! What each rank has of an optimizer that compresses and no other rank has: error feedback, momenta of its own, steps made by
//! itself. Its sum over the ranks means something only to as many ranks, so others start without it, as DeepSpeed does.

use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;

use memmap2::Mmap;
use safetensors::SafeTensors;
use tandem_collective::Tag;
use tandem_store::{Published, Staging};

use super::file::{CHUNK, header_of};
use crate::parallel::{Placement, SliceBuffer, bytes};
use crate::train::LocalBuffer;
use crate::{Engine, Error, Result, Train};

/// Messages between one pair of ranks arrive in order, and both know their lengths.
const TAG: Tag = Tag::new("what ranks have not told each other", 0);

/// The first moments of a unit that every rank has others of, on average. All data-parallel ranks call it together.
pub(super) fn mean(placement: &Placement, moments: &SliceBuffer) -> Result<SliceBuffer> {
    let data = &placement.parallel.data;
    let mut mean = moments.to_vec();
    moments.let_go();
    data.world().all_reduce_sum_f32(data.tag("mean of momenta"), &mut mean)?;
    mean.iter_mut().for_each(|mean| *mean /= data.size() as f32);
    Ok(SliceBuffer::Memory(mean))
}

/// Name of what `rank` has of `buffer` in the file.
fn tensor_name(buffer: &LocalBuffer<'_>, rank: usize) -> String {
    format!("{}.{}.{rank}", buffer.what, buffer.unit)
}

/// Writes `{name}.safetensors` if ranks have anything of their own. All ranks call it together, and make the same calls
/// whatever the store says.
pub(super) fn save(engine: &Engine<Train>, name: &str, staging: &mut Option<&mut Staging>) -> Result<()> {
    let (optimizer, data) = (engine.optimizer(), &engine.placement().parallel.data);
    let buffers = optimizer.local(engine.model());
    if buffers.is_empty() {
        return Ok(());
    }
    if data.rank() > 0 {
        for buffer in &buffers {
            let mut message = Vec::new();
            bytes::append(buffer.values, &mut message);
            data.world().send(TAG, message, 0)?;
        }
        return Ok(());
    }
    let file_name = format!("{name}.safetensors");
    let failed = |source| Error::Io { path: PathBuf::from(&file_name), source };
    let tensors = buffers.iter().flat_map(|buffer| {
        (0..data.size()).map(|rank| (tensor_name(buffer, rank), buffer.values.len())).collect::<Vec<_>>()
    });
    let metadata = serde_json::json!({
        "step": optimizer.step().to_string(),
        "joined": optimizer.joined().to_string(),
        "ranks": data.size().to_string(),
        "kind": optimizer.config().kind.to_string(),
    });
    let mut file = staging.as_mut().map(|staging| staging.create_file(&file_name).map_err(Error::from));
    if let Some(Ok(open)) = &mut file
        && let Err(error) = header_of(metadata, tensors).and_then(|header| open.write_all(&header))
    {
        file = Some(Err(failed(error)));
    }
    for buffer in &buffers {
        for rank in 0..data.size() {
            let mut message = vec![0; 4 * buffer.values.len()];
            if rank > 0 {
                data.world().receive(TAG, &mut message, rank)?;
            }
            if let Some(Ok(open)) = &mut file {
                let written = if rank > 0 { open.write_all(&message) } else { write(buffer.values, open) };
                if let Err(error) = written {
                    file = Some(Err(failed(error)));
                }
            }
        }
    }
    match file {
        None => Ok(()),
        Some(Ok(file)) => Ok(file.finish()?),
        Some(Err(error)) => Err(error),
    }
}

fn write(values: &[f32], file: &mut impl Write) -> io::Result<()> {
    let mut message = Vec::with_capacity(4 * CHUNK);
    for chunk in values.chunks(CHUNK) {
        message.clear();
        bytes::append(chunk, &mut message);
        file.write_all(&message)?;
    }
    Ok(())
}

/// Reads this rank's part of what [`save`] wrote into an optimizer whose step is restored, and returns the step after which
/// ranks last had the same weights; `None`, and all as it was, if the file is of another number of ranks or another optimizer.
pub(super) fn load(engine: &mut Engine<Train>, name: &str, checkpoint: &Published) -> Result<Option<u64>> {
    let data = engine.placement().parallel.data.clone();
    let (step, kind) = (engine.optimizer().step(), engine.optimizer().config().kind.to_string());
    let model = engine.model().clone();
    let names: Vec<String> =
        engine.optimizer().local(&model).iter().map(|buffer| tensor_name(buffer, data.rank())).collect();
    if names.is_empty() {
        return Ok(None);
    }
    let file_name = format!("{name}.safetensors");
    if !checkpoint.contains(&file_name) {
        tracing::info!(step, "the checkpoint has no {file_name}: {kind} starts without error feedback");
        return Ok(None);
    }
    let path = checkpoint.path(&file_name)?;
    let failed = |reason: String| Error::Checkpoint { path: path.clone(), reason };
    let file = File::open(&path).map_err(|error| failed(error.to_string()))?;
    // SAFETY: published checkpoints are never written to, and the run's lock keeps other processes from removing them.
    let map = unsafe { Mmap::map(&file) }.map_err(|error| failed(error.to_string()))?;
    let (_, metadata) = SafeTensors::read_metadata(&map).map_err(|error| failed(error.to_string()))?;
    let said = |key: &str| metadata.metadata().as_ref().and_then(|said| said.get(key)).cloned().unwrap_or_default();
    if said("ranks") != data.size().to_string() || said("kind") != kind {
        tracing::info!(
            step,
            "{file_name} is of {} on {} ranks: {kind} on {} starts without error feedback",
            said("kind"),
            said("ranks"),
            data.size()
        );
        return Ok(None);
    }
    if said("step") != step.to_string() {
        return Err(failed(format!("the weights are of step {step}, this file of step {}", said("step"))));
    }
    let joined = said("joined").parse().map_err(|_| failed("its metadata names no step of an exchange".into()))?;
    let tensors = SafeTensors::deserialize(&map).map_err(|error| failed(error.to_string()))?;
    for (values, name) in engine.optimizer_mut().local_mut().into_iter().zip(&names) {
        let tensor = tensors.tensor(name).map_err(|error| failed(error.to_string()))?;
        if tensor.shape() != [values.len()] || tensor.data().len() != 4 * values.len() {
            return Err(failed(format!("{name} has the shape {:?} instead of [{}]", tensor.shape(), values.len())));
        }
        bytes::fill(values, tensor.data());
    }
    Ok(Some(joined))
}
