//! What the units of a model hold: its weights, or adapters beside them.

use std::sync::Arc;

use super::layout::{Param, block, ends};
use super::{AdapterSet, Head, UnitId};
use crate::model::spec::ModelSpec;

/// What units hold. Whatever stores, cuts, gathers or moves units does the same with either kind.
#[derive(Clone, Debug)]
pub enum Content {
    /// The weights of a model with this head.
    Weights(Head),
    /// Adapters of some of its linear maps.
    Adapters(Arc<AdapterSet>),
}

impl Content {
    /// The parameters of the unit `id`, whole.
    pub(super) fn params(&self, spec: &ModelSpec, id: UnitId) -> Vec<Param> {
        match (self, id) {
            (Content::Weights(head), UnitId::Ends) => ends(spec, *head),
            (Content::Weights(_), UnitId::Block(_)) => block(spec),
            (Content::Adapters(set), UnitId::Ends) => set.ends(spec),
            (Content::Adapters(set), UnitId::Block(_)) => set.block(spec),
        }
    }
}

impl From<Head> for Content {
    fn from(head: Head) -> Self {
        Content::Weights(head)
    }
}

impl From<&Content> for Content {
    fn from(content: &Content) -> Self {
        content.clone()
    }
}
