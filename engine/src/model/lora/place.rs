//! Attaching adapters to a model in its place, and the base without them.

use std::sync::Arc;

use tandem_kernels::slice::{with_slice, with_slice_mut};

use super::{Adapters, LoraConfig};
use crate::model::Model;
use crate::model::unit::{Content, Cut, Head, SCORE, UnitBuffer, UnitId, UnitLayout, from_whole};
use crate::parallel::{Placement, Weights, layouts_of};
use crate::precision::Precision;
use crate::{Error, Result};

impl Model {
    /// This model, in its place, with fresh adapters: `A` drawn from `seed` as PEFT draws it (uniform within `±1/√inputs`),
    /// `B` zero, so that nothing changes yet. With a scalar head, the head itself is trained along with the adapters, from
    /// where it is. All ranks call it together, with the placement that the model has.
    ///
    /// # Errors
    /// If the config does not fit the model, or the memory cannot be had.
    pub fn with_lora(self, config: &LoraConfig, seed: u64, placement: &Placement) -> Result<Self> {
        let set = Arc::new(config.resolve(self.spec(), self.head())?);
        let score = self.score()?;
        let spec = self.spec().clone();
        self.with_adapters(config, placement, |index| {
            let content = Content::Adapters(set.clone());
            let id = if index == 0 { UnitId::Ends } else { UnitId::Block(index - 1) };
            let unit = UnitBuffer::initial(&Arc::new(UnitLayout::of(&spec, content, id)), seed)?;
            if let (UnitId::Ends, Some(score)) = (id, &score) {
                let start = unit.get(SCORE)?;
                with_slice_mut(&start, |start| start.copy_from_slice(score))?;
            }
            Ok(unit)
        })
    }

    /// This model, in its place, with given adapters, each unit of which `whole` brings in the whole layout when it is its turn;
    /// see [`super::peft::read`]. All ranks call it together, with the placement that the model has.
    ///
    /// # Errors
    /// If the config does not fit the model, it has adapters already, or `whole` fails.
    pub fn with_adapters(
        self,
        config: &LoraConfig,
        placement: &Placement,
        mut whole: impl FnMut(usize) -> Result<UnitBuffer>,
    ) -> Result<Self> {
        if self.adapters.is_some() {
            return Err(Error::Lora("the model has adapters already; merge them first, by exporting it".into()));
        }
        let (spec, parallel) = (self.spec(), self.parallel());
        if placement.parallel.mesh != parallel.mesh || placement.parallel.at != parallel.at {
            return Err(Error::Mesh("adapters take their place where the model has its own".into()));
        }
        let set = Arc::new(config.resolve(spec, self.head())?);
        let content = Content::Adapters(set.clone());
        let layouts = layouts_of(spec, &content, &parallel.mesh, parallel.at.pipeline, self.cut());
        // They are few, and what a step changes in them would be lost in rounding.
        let placement = &Placement { precision: Precision::F32, is_frozen: false, ..placement.clone() };
        let weights = Weights::place(placement, &layouts, |layout| {
            if layout.is_empty() {
                return UnitBuffer::zeros(layout);
            }
            let unit = whole(layout.id.index())?;
            let expected = UnitLayout::of(spec, &content, layout.id);
            if **unit.layout() != expected {
                let (unit, got) = (layout.id, unit.layout().len());
                return Err(Error::BufferLength { unit, expected: expected.len(), got });
            }
            // A buffer of its own: units in one piece would share the caller's.
            if *self.cut() == Cut::none() { unit.duplicate() } else { from_whole(spec, &content, &unit, self.cut()) }
        })?;
        Ok(Self { adapters: Some(Adapters { config: Arc::new(config.clone()), set, weights }), ..self })
    }

    /// The model without its adapters. It shares the weights, which training adapters never changes: the reference policy of a
    /// model with adapters, without a second copy.
    pub fn base(&self) -> Self {
        Self { adapters: None, ..self.clone() }
    }

    /// Its adapters, if it has any.
    pub fn lora(&self) -> Option<&LoraConfig> {
        self.adapters.as_ref().map(|adapters| &*adapters.config)
    }

    /// The scalar head, if there is one here.
    fn score(&self) -> Result<Option<Vec<f32>>> {
        if self.head() != Head::Scalar {
            return Ok(None);
        }
        let score = self.weights.fetch_master(0)?.find(SCORE)?;
        Ok(score.map(|score| with_slice(&score, <[f32]>::to_vec)).transpose()?)
    }
}
