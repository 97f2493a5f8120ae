//! Low-rank adapters as `[lora]` asks for them.

use tandem_engine::Model;
use tandem_engine::model::lora::{self, peft};
use tandem_engine::model::spec::ModelSpec;
use tandem_engine::model::unit::Head;
use tandem_engine::parallel::Placement;
use tandem_store::Staging;

use crate::config::{LoraConfig, LoraExport};
use crate::error::Result;
use crate::run::Run;

/// What adapters a model gets, if any: those of the folder to start from, or those that the section describes.
///
/// # Errors
/// A folder that holds no adapters of this model.
pub(crate) fn config(section: &LoraConfig, spec: &ModelSpec, head: Head) -> Result<Option<lora::LoraConfig>> {
    if !section.is_on() {
        return Ok(None);
    }
    if let Some(folder) = &section.adapter {
        return Ok(Some(peft::read(folder, spec, head)?.config));
    }
    let LoraConfig { rank, alpha, dropout, targets, .. } = section.clone();
    Ok(Some(lora::LoraConfig { rank, alpha, dropout: dropout as f32, targets }))
}

/// The model with its adapters, fresh or from the folder to start from; the model itself if it gets none.
///
/// # Errors
/// A folder that holds no adapters of this model, a target that it does not have, or memory that cannot be had.
pub(crate) fn attach(model: Model, section: &LoraConfig, seed: u64, placement: &Placement) -> Result<Model> {
    let Some(config) = config(section, model.spec(), model.head())? else { return Ok(model) };
    Ok(match &section.adapter {
        Some(folder) => {
            let found = peft::read(folder, model.spec(), model.head())?;
            model.with_adapters(&config, placement, |index| found.unit(index))?
        }
        None => model.with_lora(&config, seed, placement)?,
    })
}

/// Publishes the adapters of a finished model beside it, if they are asked for; `base` is the model without them.
///
/// # Errors
/// An error of the file system, or a peer that failed.
pub(crate) fn publish(model: &Model, section: &LoraConfig, base: &str, run: &mut Run) -> Result<()> {
    if model.lora().is_none() || section.export == LoraExport::Merged {
        return Ok(());
    }
    run.publish_adapter(|staging: Option<&mut Staging>| Ok(peft::write(model, base, staging)?))
}
