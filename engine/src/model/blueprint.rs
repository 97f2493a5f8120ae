//! A model that is not in memory: what it is, and how each of its units is made when its turn comes.
//!
//! A rank that will keep a part of every unit never holds more than its parts and one whole unit, however large the model.

use std::fmt;
use std::sync::Arc;

use super::Model;
use super::spec::ModelSpec;
use super::unit::{Head, UnitBuffer, UnitId, UnitLayout};
use crate::parallel::Placement;
use crate::{Error, Result};

type MakeUnit = dyn Fn(&Arc<UnitLayout>) -> Result<UnitBuffer> + Send + Sync;

/// A model whose weights are still on disk, or in the seed that they are drawn from. Clones share the source.
#[derive(Clone)]
pub struct Blueprint {
    spec: ModelSpec,
    head: Head,
    layouts: Vec<Arc<UnitLayout>>,
    make: Arc<MakeUnit>,
}

impl Blueprint {
    /// A model each of whose units `make` makes, in f32 and as often as it is asked for.
    pub fn new(
        spec: ModelSpec,
        head: Head,
        make: impl Fn(&Arc<UnitLayout>) -> Result<UnitBuffer> + Send + Sync + 'static,
    ) -> Self {
        let layouts = UnitLayout::all(&spec, head).into_iter().map(Arc::new).collect();
        Self { spec, head, layouts, make: Arc::new(make) }
    }

    /// A model with initial weights drawn from `seed`, those of [`Model::initial`].
    pub fn initial(spec: ModelSpec, head: Head, seed: u64) -> Self {
        Self::new(spec, head, move |layout| UnitBuffer::initial(layout, seed))
    }

    /// The same model, to whose unit `id` `change` is done whenever it is made.
    pub fn amended(self, id: UnitId, change: impl Fn(&UnitBuffer) -> Result<()> + Send + Sync + 'static) -> Self {
        let make = self.make;
        let make = move |layout: &Arc<UnitLayout>| {
            let unit = make(layout)?;
            if layout.id == id {
                change(&unit)?;
            }
            Ok(unit)
        };
        Self { make: Arc::new(make), ..self }
    }

    /// What the model is.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// What its last hidden rows go into.
    pub fn head(&self) -> Head {
        self.head
    }

    /// Makes the units one after the other: the ends, then the blocks.
    pub fn units(&self) -> impl Iterator<Item = Result<UnitBuffer>> + '_ {
        self.layouts.iter().map(|layout| (self.make)(layout))
    }

    /// The whole model, on this rank alone.
    ///
    /// # Errors
    /// If the weights cannot be read or the memory cannot be had.
    pub fn model(&self) -> Result<Model> {
        Model::from_parts(self.spec.clone(), self.head, self.units().collect::<Result<_>>()?)
    }

    /// This rank's part of the model. Every unit is let go of as soon as its part is taken.
    ///
    /// # Errors
    /// As [`Self::model`], and if the model cannot be cut so.
    pub fn place(&self, placement: &Placement) -> Result<Model> {
        Model::placed(self.spec.clone(), self.head, placement, |index| {
            let missing = Error::UnitCount { expected: index + 1, got: self.layouts.len() };
            (self.make)(self.layouts.get(index).ok_or(missing)?)
        })
    }
}

impl fmt::Debug for Blueprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Blueprint").field("spec", &self.spec).field("head", &self.head).finish_non_exhaustive()
    }
}
