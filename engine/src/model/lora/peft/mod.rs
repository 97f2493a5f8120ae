//! Adapters as the Python package `peft` keeps them: a folder with `adapter_config.json` and `adapter_model.safetensors`.
//!
//! A tensor's name is that of the base's tensor behind `base_model.model.`, with `lora_A` or `lora_B` before its last part; the
//! matrices are `A [r, in]` and `B [out, r]` for every family, whichever way round the base stores its own. A scalar head that was
//! trained along lies beside them under its own name, as what `peft` calls `modules_to_save`.
//!
//! Reading is strict: missing, unexpected and misshaped tensors are listed, and options that would change the numbers and are
//! not computed here are refused by name.

mod config;

use std::path::Path;
use std::sync::Arc;

use tandem_store::Staging;

use crate::model::Model;
use crate::model::export::{ExportDtype, Units, pretty, write_weights};
use crate::model::families::{self, TensorMap};
use crate::model::import::{fill, header, sources};
use crate::model::names::{Matched, Part};
use crate::model::spec::ModelSpec;
use crate::model::unit::{AdapterSet, Content, Head, SCORE, UnitBuffer, UnitId, UnitLayout};
use crate::{Error, LoraConfig, Result};

/// The file that says what the adapters are.
const CONFIG: &str = "adapter_config.json";
/// The file that holds them.
const WEIGHTS: &str = "adapter_model.safetensors";
/// What stands before the base's names.
const PREFIX: &str = "base_model.model.";

/// Adapters as they were found on disk.
#[derive(Debug)]
pub struct Adapter {
    /// What they are.
    pub config: LoraConfig,
    /// What their folder says of the model they belong to.
    pub base: Option<String>,
    /// Their units in the whole layout, for [`Model::with_adapters`]: the ends, then the blocks.
    pub units: Vec<UnitBuffer>,
}

/// Every tensor of an adapter and where it lies in its unit.
fn tensors(spec: &ModelSpec, set: &AdapterSet) -> Result<Vec<TensorMap>> {
    let map = |name, unit, param, shape: [usize; 2]| TensorMap {
        name,
        unit,
        param,
        part: Part::Whole,
        first_row: 0,
        rows: shape[0],
        transposed: false,
        shape: shape.to_vec(),
    };
    let mut maps = Vec::new();
    for base in families::tensors(spec, set.head)? {
        let Some(stem) = base.name.strip_suffix(".weight") else { continue };
        for site in set.of(base.param).filter(|site| site.part == base.part) {
            let [outputs, inputs] = site.shape(spec);
            let name = |matrix| format!("{PREFIX}{stem}.lora_{matrix}.weight");
            maps.push(map(name("A"), base.unit, site.a, [set.rank, inputs]));
            maps.push(map(name("B"), base.unit, site.b, [outputs, set.rank]));
        }
        if base.param == SCORE {
            maps.push(map(format!("{PREFIX}{}", base.name), base.unit, SCORE, [1, spec.embedding_width()]));
        }
    }
    Ok(maps)
}

/// Writes the adapters of a model into a folder being staged; `base` is the name or path of the model without them, which
/// `peft` loads first. All ranks call it together; only rank 0 of the world has a `staging`, the others bring what they hold.
///
/// # Errors
/// If the model has no adapters, one of their numbers is not finite, a file cannot be written, or ranks have lost each other.
/// After an error of rank 0, all ranks have still made the same calls.
pub fn write(model: &Model, base: &str, staging: Option<&mut Staging>) -> Result<()> {
    let Some(adapters) = &model.adapters else {
        return Err(Error::Lora("the model has no adapters to write; export the model itself".into()));
    };
    let mut maps = tensors(model.spec(), &adapters.set)?;
    maps.sort_by(|a, b| a.name.cmp(&b.name));
    let bring = |unit| model.whole_trained_unit(unit);
    let mut units = Units::of(&maps, &bring);
    let written = match staging {
        Some(staging) => {
            let config = config::write(&adapters.config, &adapters.set, model.spec(), base);
            let written = staging.write(CONFIG, &pretty(&config)).map_err(Error::from);
            written.and_then(|()| write_weights(WEIGHTS, &maps, &mut units, ExportDtype::F32, staging))
        }
        None => Ok(()),
    };
    let brought = units.skip_rest();
    written.and(brought)
}

/// Reads the adapters in `folder`, which must fit a model of `spec` and `head`.
///
/// # Errors
/// If a file is missing or damaged, an option is not supported, or the tensors are not those of the config and the model.
pub fn read(folder: &Path, spec: &ModelSpec, head: Head) -> Result<Adapter> {
    let path = folder.join(CONFIG);
    if !path.exists() {
        let remedy = "name a folder that peft's save_pretrained has written";
        return Err(Error::model_file(folder, format!("it has no {CONFIG}, so it is no adapter"), remedy));
    }
    let (config, base) = config::read(&path, head)?;
    let set = config.resolve(spec, head).map_err(|error| {
        Error::model_file(&path, error.to_string(), "take the model that the adapters were made for")
    })?;
    let path = folder.join(WEIGHTS);
    if !path.exists() {
        let remedy = "save the adapters anew with safe_serialization=True; a pickle can run code when it is read";
        return Err(Error::model_file(folder, format!("it has no {WEIGHTS}"), remedy));
    }
    let (file, stored) = header::read(&path)?;
    let found: Vec<(&str, &[usize])> =
        stored.iter().map(|tensor| (tensor.name.as_str(), tensor.shape.as_slice())).collect();
    let maps = tensors(spec, &set)?;
    let matched = Matched::new(families::names(spec.family), &maps, &found, |_| false);
    let sources = sources(&path, matched)?;
    let layouts = UnitLayout::all(spec, Content::Adapters(Arc::new(set)));
    let mut units: Vec<Vec<f32>> = layouts.iter().map(|layout| vec![0f32; layout.len()]).collect();
    for (map, source) in maps.iter().zip(sources) {
        let unit = map.unit.index();
        fill::fill(&mut units[unit], &layouts[unit], map, &path, &file, &stored[source])?;
    }
    let units = layouts.into_iter().zip(units).map(|(layout, flat)| UnitBuffer::from_vec(&Arc::new(layout), flat));
    Ok(Adapter { config, base, units: units.collect::<Result<_>>()? })
}

impl Adapter {
    /// The unit `id`, for [`Model::with_adapters`].
    ///
    /// # Errors
    /// If there is no such unit.
    pub fn unit(&self, index: usize) -> Result<UnitBuffer> {
        let found = self.units.get(index).cloned();
        found.ok_or(Error::UnitCount { expected: index + 1, got: self.units.len() })
    }

    /// Numbers in all.
    pub fn parameters(&self) -> usize {
        self.units.iter().filter(|unit| unit.layout().id != UnitId::Ends).map(|unit| unit.layout().len()).sum()
    }
}
