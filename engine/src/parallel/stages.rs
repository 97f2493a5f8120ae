//! Which units a pipeline stage holds.

use std::ops::Range;
use std::sync::Arc;

use super::Mesh;
use crate::model::spec::ModelSpec;
use crate::model::unit::{Content, Cut, UnitId, UnitLayout, part};

/// The blocks of one stage of a pipeline: nearly equal numbers, more in the earlier stages.
pub(crate) fn blocks_of_stage(spec: &ModelSpec, mesh: &Mesh, stage: usize) -> Range<usize> {
    part(spec.layers, mesh.pipeline, stage)
}

/// The layouts of what one rank computes; a unit of another stage has nothing. Both ends of a pipeline hold the ends: the
/// first for the embedding, the last for the head, which may be the same matrix.
pub(crate) fn layouts_of(
    spec: &ModelSpec,
    content: &Content,
    mesh: &Mesh,
    stage: usize,
    cut: &Cut,
) -> Vec<Arc<UnitLayout>> {
    let blocks = blocks_of_stage(spec, mesh, stage);
    let has_ends = stage == 0 || stage + 1 == mesh.pipeline;
    let all = UnitLayout::all_cut(spec, content, cut).into_iter();
    let held = all.map(|layout| match layout.id {
        UnitId::Ends if has_ends => layout,
        UnitId::Block(index) if blocks.contains(&index) => layout,
        _ => layout.emptied(),
    });
    held.map(Arc::new).collect()
}
