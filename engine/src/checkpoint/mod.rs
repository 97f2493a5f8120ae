//! What a checkpoint holds of the engine: what is trained, both moments and the step, unit by unit, as safetensors.
//!
//! Of a model with adapters that is the adapters; the base is where it came from, and its name is the caller's to keep.
//! Units are stored in the whole layout, whoever holds what of them, so any number of ranks can read what any other number
//! has written. Rank 0 writes; the others bring what they hold.
//!
//! What ranks have of an optimizer that compresses, each something else, only as many ranks can read again.
//!
//! Publishing, digests and falling back to an older checkpoint belong to `tandem-store`; here is only what is inside.

mod file;
mod local;

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use tandem_kernels::slice::with_slice;
use tandem_store::{Published, Staging};

use crate::model::Model;
use crate::model::lora::LoraConfig;
use crate::model::spec::ModelSpec;
use crate::model::unit::{Content, Head, UnitBuffer, UnitLayout, from_whole, to_whole};
use crate::parallel::{Distributed, Placement, SliceBuffer};
use crate::train::{Ema, OptimizerConfig, slice_rank, slicing};
use crate::{Engine, Error, Result, Train};
use file::UnitFile;

/// Writes the weights that are trained, moments and step of an engine as `{name}.safetensors`, `{name}-first.safetensors` and
/// `{name}-second.safetensors`, and as `{name}-errors.safetensors` what every rank has not yet told the others, if its
/// optimizer compresses. Where ranks have made steps by themselves, the weights are those that all had last, and first
/// moments that differ are written as their mean. All ranks call it together; only rank 0 of the world has a `staging`.
///
/// # Errors
/// If the store refuses or ranks have lost each other. After an error of the store, all ranks have still made the same calls.
pub fn save_engine(engine: &Engine<Train>, name: &str, mut staging: Option<&mut Staging>) -> Result<()> {
    let (model, optimizer, placement) = (engine.model(), engine.optimizer(), engine.placement());
    let step = optimizer.step();
    let weights = save_units(model, name, step, &mut staging, |index| match optimizer.local_steps() {
        None => model.whole_trained_unit(index),
        Some(steps) => whole_slice(model, placement, &steps.anchor()[index], index),
    });
    let first = save_units(model, &first(name), step, &mut staging, |index| {
        let moments = &optimizer.first_moments()[index];
        match optimizer.has_local_moments() {
            false => whole_slice(model, placement, moments, index),
            true => whole_slice(model, placement, &local::mean(placement, moments)?, index),
        }
    });
    let second = match optimizer.second_moments() {
        [] => Ok(()),
        slices => save_units(model, &second(name), step, &mut staging, |index| {
            whole_slice(model, placement, &slices[index], index)
        }),
    };
    let errors = local::save(engine, &errors(name), &mut staging);
    optimizer.let_go();
    weights.and(first).and(second).and(errors)
}

/// Reads what [`save_engine`] wrote, each rank its part.
///
/// What ranks had not yet told each other is read if there are as many ranks as there were, and forgotten otherwise.
///
/// # Errors
/// If a file is missing or does not hold the units of `spec`.
pub fn load_engine(
    spec: &ModelSpec,
    head: Head,
    config: OptimizerConfig,
    name: &str,
    checkpoint: &Published,
    placement: &Placement,
) -> Result<Engine<Train>> {
    let weights = open(spec, &head.into(), name, checkpoint)?;
    let model = Model::placed(spec.clone(), head, placement, |index| unit(&weights, index, name, checkpoint))?;
    restored(model, config, weights.step, name, checkpoint, placement)
}

/// Reads what [`save_engine`] wrote of an engine with adapters on the model `base`, which has taken its place; each rank reads
/// its part.
///
/// # Errors
/// If a file is missing or does not hold such adapters of the model.
pub fn load_lora_engine(
    base: Model,
    lora: &LoraConfig,
    config: OptimizerConfig,
    name: &str,
    checkpoint: &Published,
    placement: &Placement,
) -> Result<Engine<Train>> {
    let content = Content::Adapters(Arc::new(lora.resolve(base.spec(), base.head())?));
    let adapters = open(base.spec(), &content, name, checkpoint)?;
    let model = base.with_adapters(lora, placement, |index| unit(&adapters, index, name, checkpoint))?;
    restored(model, config, adapters.step, name, checkpoint, placement)
}

/// An engine at `step`, whose moments are read.
fn restored(
    model: Model,
    config: OptimizerConfig,
    step: u64,
    name: &str,
    checkpoint: &Published,
    placement: &Placement,
) -> Result<Engine<Train>> {
    let content = model.trained_content();
    let mut engine = Engine::placed(model.clone(), config, placement.clone())?;
    let placement = engine.placement().clone();
    engine.optimizer_mut().restore(step, |moments| {
        // An optimizer without second moments has none in its file.
        let files = moments.into_iter().zip([first(name), second(name)]).filter(|(slices, _)| !slices.is_empty());
        for (slices, name) in files {
            let file = open(model.spec(), &content, &name, checkpoint)?;
            if file.step != step {
                return Err(Error::Checkpoint {
                    path: checkpoint.dir().to_path_buf(),
                    reason: format!("the weights are of step {step}, {name} of step {}", file.step),
                });
            }
            fill_slices(&model, &placement, slices, |index| unit(&file, index, &name, checkpoint))?;
        }
        Ok(())
    })?;
    let joined = local::load(&mut engine, &errors(name), checkpoint)?;
    engine.optimizer_mut().resume(&model, joined)?;
    Ok(engine)
}

/// Writes an average of the weights of `model` as `{name}.safetensors`; see [`save_engine`].
///
/// # Errors
/// If the store refuses or ranks have lost each other.
pub fn save_ema(ema: &Ema, model: &Model, name: &str, mut staging: Option<&mut Staging>) -> Result<()> {
    save_units(model, name, 0, &mut staging, |index| whole_slice(model, ema.placement(), &ema.slices()[index], index))
}

/// Reads what [`save_ema`] wrote of an average that follows `model`.
///
/// # Errors
/// If the file is missing or does not hold the units of the model.
pub fn load_ema(model: &Model, decay: f64, name: &str, checkpoint: &Published, placement: &Placement) -> Result<Ema> {
    let file = open(model.spec(), &model.trained_content(), name, checkpoint)?;
    let mut ema = Ema::new(model, decay, placement)?;
    fill_slices(model, placement, ema.slices_mut(), |index| unit(&file, index, name, checkpoint))?;
    Ok(ema)
}

fn first(name: &str) -> String {
    format!("{name}-first")
}

fn second(name: &str) -> String {
    format!("{name}-second")
}

fn errors(name: &str) -> String {
    format!("{name}-errors")
}

fn whole_layouts(spec: &ModelSpec, content: &Content) -> Vec<Arc<UnitLayout>> {
    UnitLayout::all(spec, content).into_iter().map(Arc::new).collect()
}

/// Brings every unit to rank 0, which writes it; goes on bringing them after an error there, for the others do.
fn save_units(
    model: &Model,
    name: &str,
    step: u64,
    staging: &mut Option<&mut Staging>,
    whole: impl Fn(usize) -> Result<Option<UnitBuffer>>,
) -> Result<()> {
    let file_name = format!("{name}.safetensors");
    let layouts = whole_layouts(model.spec(), &model.trained_content());
    let mut file = staging.as_mut().map(|staging| staging.create_file(&file_name).map_err(Error::from));
    let failed = |source| Error::Io { path: PathBuf::from(&file_name), source };
    if let Some(Ok(open)) = &mut file {
        let written = file::header(&layouts, step).and_then(|header| open.write_all(&header));
        if let Err(error) = written {
            file = Some(Err(failed(error)));
        }
    }
    for index in 0..layouts.len() {
        let unit = whole(index)?;
        if let (Some(Ok(open)), Some(unit)) = (&mut file, unit)
            && let Err(error) = file::write_unit(&unit, open)
        {
            file = Some(Err(failed(error)));
        }
    }
    match file {
        None => Ok(()),
        Some(Ok(file)) => Ok(file.finish()?),
        Some(Err(error)) => Err(error),
    }
}

/// A unit of what ranks hold in slices as an optimizer does, this one in `slice`, whole on rank 0. The slice is let go of.
fn whole_slice(model: &Model, placement: &Placement, slice: &SliceBuffer, index: usize) -> Result<Option<UnitBuffer>> {
    let (spec, content, parallel) = (model.spec(), &model.trained_content(), model.parallel());
    let layout = &model.trained_layouts()[index];
    let slicing = slicing(layout.len(), placement);
    if parallel.world.is_solo() {
        let unit = UnitBuffer::from_vec(layout, slice[..layout.len()].to_vec())?;
        slice.let_go();
        return Ok(Some(to_whole(spec, content, &unit)?));
    }
    // Only unit `index` is asked for.
    let read = |_: usize, back: &mut dyn FnMut(&[f32])| {
        back(slice);
        Ok(())
    };
    let sliced = slicing.ranks > 1;
    let whole = Distributed { spec, content, parallel, sliced, read: &read }.whole_unit(index);
    slice.let_go();
    whole
}

/// Fills this rank's slices from whole units.
fn fill_slices(
    model: &Model,
    placement: &Placement,
    slices: &mut [SliceBuffer],
    whole: impl Fn(usize) -> Result<UnitBuffer>,
) -> Result<()> {
    let content = model.trained_content();
    for (index, layout) in model.trained_layouts().iter().enumerate().filter(|(_, layout)| !layout.is_empty()) {
        let unit = from_whole(model.spec(), &content, &whole(index)?, model.cut())?;
        let range = slicing(layout.len(), placement).range(slice_rank(placement));
        with_slice(unit.flat(), |values| slices[index][..range.len()].copy_from_slice(&values[range]))?;
        slices[index].let_go();
    }
    Ok(())
}

fn open(spec: &ModelSpec, content: &Content, name: &str, checkpoint: &Published) -> Result<UnitFile> {
    let path = checkpoint.path(&format!("{name}.safetensors"))?;
    UnitFile::open(&path, whole_layouts(spec, content)).map_err(|reason| Error::Checkpoint { path, reason })
}

fn unit(file: &UnitFile, index: usize, name: &str, checkpoint: &Published) -> Result<UnitBuffer> {
    let failed = |reason| Error::Checkpoint { path: checkpoint.dir().join(format!("{name}.safetensors")), reason };
    file.unit(index).map_err(failed)
}
