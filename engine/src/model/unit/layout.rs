//! The parameters of a unit and where they lie in its flat buffer.

use std::ops::Range;

use super::{
    Content, Cut, DOWN, DOWN_BIAS, EMBEDDING, FINAL_NORM, FINAL_NORM_BIAS, GATE_B, HEAD, Head, Init, KEY_B, NORM1,
    NORM1_BIAS, NORM2, NORM2_BIAS, OUTPUT, OUTPUT_A, OUTPUT_BIAS, POSITIONS, PROJECT_IN, PROJECT_OUT, Piece, QKV,
    QKV_B, QKV_BIAS, QUERY_B, SCORE, Shard, UP, UP_B, UP_BIAS, UnitId, VALUE_B,
};
use crate::model::spec::{ModelSpec, NormKind};

/// Sections and slices begin at multiples of this many elements, so that sums over blocks of this length do not depend on
/// how a unit is spread over ranks.
pub const BLOCK_ELEMENTS: usize = 1024;

/// One parameter, or one piece of it, inside a unit's flat buffer.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamSlot {
    /// Name inside the unit.
    pub name: &'static str,
    /// Shape, outputs first.
    pub shape: Vec<usize>,
    /// First element in the flat buffer.
    pub offset: usize,
    /// Start value.
    pub init: Init,
    /// How tensor parallelism may cut it.
    pub shard: Shard,
    /// The piece that it belongs to; `None`: to all of them.
    pub piece: Option<usize>,
    /// Whether weight decay applies: to matrices, not to norms and biases.
    pub decay: bool,
}

impl ParamSlot {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A stretch of the flat buffer that is held whole or not at all: what all pieces share, or one piece.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// The piece, or `None` for what all share.
    pub piece: Option<usize>,
    /// First element in this buffer.
    pub start: usize,
    /// First element in the buffer of a rank that holds all pieces.
    pub common_start: usize,
    /// Elements, the padding at the end included.
    pub len: usize,
}

/// The parameters of one unit and where they lie in its flat buffer.
///
/// In one piece, parameters lie back to back. In several pieces, first comes what all share, then one section for each piece
/// held, each padded to a multiple of [`BLOCK_ELEMENTS`].
#[derive(Clone, Debug, PartialEq)]
pub struct UnitLayout {
    /// Which unit.
    pub id: UnitId,
    /// Its cut.
    pub cut: Cut,
    /// Its parameters in the order of their offsets.
    pub params: Vec<ParamSlot>,
    /// Its sections in order.
    pub sections: Vec<Section>,
    len: usize,
}

/// What a parameter is before it is given a place.
pub(super) struct Param {
    pub(super) name: &'static str,
    pub(super) shape: Vec<usize>,
    pub(super) init: Init,
    pub(super) shard: Shard,
}

impl UnitLayout {
    /// Layout of the unit `id` of a model, in one piece.
    pub fn of(spec: &ModelSpec, content: impl Into<Content>, id: UnitId) -> Self {
        Self::cut(spec, content, id, &Cut::none())
    }

    /// Layout of what is held of the unit `id` of a model.
    pub fn cut(spec: &ModelSpec, content: impl Into<Content>, id: UnitId, cut: &Cut) -> Self {
        let params = content.into().params(spec, id);
        let mut unit = Self { id, cut: cut.clone(), params: Vec::new(), sections: Vec::new(), len: 0 };
        if cut.pieces == 1 {
            unit.section(None, 0, params.iter().map(|param| (param, param.shape.clone())));
            return unit;
        }
        let shared = params.iter().filter(|param| param.shard == Shard::Replicated);
        unit.section(None, 0, shared.map(|param| (param, param.shape.clone())));
        let mut common = unit.len;
        for index in 0..cut.pieces {
            let piece = cut.piece(spec, index);
            let cut_params = params.iter().filter(|param| param.shard != Shard::Replicated);
            let shapes = cut_params.map(|param| (param, piece_shape(param, spec, &piece)));
            if cut.held.contains(&index) {
                unit.section(Some(index), common, shapes);
                common += unit.sections.last().map_or(0, |section| section.len);
            } else {
                let elements: usize = shapes.map(|(_, shape)| shape.iter().product::<usize>()).sum();
                common += elements.next_multiple_of(BLOCK_ELEMENTS);
            }
        }
        unit
    }

    /// Layouts of all units of a model in one piece: the ends, then the blocks.
    pub fn all(spec: &ModelSpec, content: impl Into<Content>) -> Vec<Self> {
        Self::all_cut(spec, content, &Cut::none())
    }

    /// Layouts of what is held of all units of a model.
    pub fn all_cut(spec: &ModelSpec, content: impl Into<Content>, cut: &Cut) -> Vec<Self> {
        let (content, blocks) = (content.into(), (0..spec.layers).map(UnitId::Block));
        std::iter::once(UnitId::Ends).chain(blocks).map(|id| Self::cut(spec, &content, id, cut)).collect()
    }

    /// The same unit where nothing of it is held.
    pub fn emptied(&self) -> Self {
        Self { id: self.id, cut: self.cut.clone(), params: Vec::new(), sections: Vec::new(), len: 0 }
    }

    /// Elements of the flat buffer, padding included.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the unit has no parameter.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Parameters, without padding.
    pub fn parameters(&self) -> usize {
        self.params.iter().map(ParamSlot::len).sum()
    }

    /// The slot called `name`; with several pieces, that of the first one held.
    pub fn slot(&self, name: &str) -> Option<&ParamSlot> {
        self.params.iter().find(|slot| slot.name == name)
    }

    /// The slot called `name` of the piece `piece`, or the one that all pieces share.
    pub fn slot_of(&self, piece: usize, name: &str) -> Option<&ParamSlot> {
        self.params.iter().find(|slot| slot.name == name && slot.piece.is_none_or(|own| own == piece))
    }

    /// Runs of neighbouring parameters with the same decay: (elements, decay). They cover the buffer; padding, which is
    /// zero and stays so, goes with its neighbour.
    pub fn decay_ranges(&self) -> Vec<(Range<usize>, bool)> {
        let mut ranges: Vec<(Range<usize>, bool)> = Vec::new();
        for slot in &self.params {
            let end = slot.offset + slot.len();
            match ranges.last_mut() {
                Some((range, decay)) if *decay == slot.decay => range.end = end,
                Some((range, _)) => {
                    range.end = slot.offset;
                    ranges.push((slot.offset..end, slot.decay));
                }
                None => ranges.push((slot.offset..end, slot.decay)),
            }
        }
        if let Some((range, _)) = ranges.last_mut() {
            range.end = self.len;
        }
        ranges
    }

    fn section<'a>(
        &mut self,
        piece: Option<usize>,
        common_start: usize,
        params: impl Iterator<Item = (&'a Param, Vec<usize>)>,
    ) {
        let start = self.len;
        for (param, shape) in params {
            let &Param { name, init, shard, .. } = param;
            let slot = ParamSlot { name, offset: self.len, init, shard, piece, decay: shape.len() > 1, shape };
            self.len += slot.len();
            self.params.push(slot);
        }
        if self.cut.pieces > 1 {
            self.len = start + (self.len - start).next_multiple_of(BLOCK_ELEMENTS);
        }
        self.sections.push(Section { piece, start, common_start, len: self.len - start });
    }
}

/// Shape of what `piece` has of a parameter.
fn piece_shape(param: &Param, spec: &ModelSpec, piece: &Piece) -> Vec<usize> {
    let mut shape = param.shape.clone();
    match param.shard {
        Shard::Replicated => {}
        Shard::Rows => shape[0] = row_parts(param.name, spec, piece).iter().map(|part| part.len()).sum(),
        Shard::Columns => shape[1] = columns(param.name, spec, piece).len(),
    }
    shape
}

/// Which rows of a parameter that is cut along its outputs belong to `piece`, in the order in which it holds them.
pub(super) fn row_parts(name: &str, spec: &ModelSpec, piece: &Piece) -> Vec<Range<usize>> {
    let scaled = |range: &Range<usize>, by: usize, from: usize| from + range.start * by..from + range.end * by;
    let (queries, keys) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
    match name {
        QKV | QKV_BIAS | QKV_B => vec![
            scaled(&piece.heads, spec.head_dim, 0),
            scaled(&piece.kv_heads, spec.head_dim, queries),
            scaled(&piece.kv_heads, spec.head_dim, queries + keys),
        ],
        QUERY_B => vec![scaled(&piece.heads, spec.head_dim, 0)],
        KEY_B | VALUE_B => vec![scaled(&piece.kv_heads, spec.head_dim, 0)],
        UP | UP_BIAS if spec.gated => vec![piece.mlp.clone(), scaled(&piece.mlp, 1, spec.mlp_width)],
        UP | UP_BIAS | UP_B | GATE_B => vec![piece.mlp.clone()],
        _ => vec![piece.vocabulary.clone()],
    }
}

/// Which columns of a parameter that is cut along its inputs belong to `piece`.
pub(super) fn columns(name: &str, spec: &ModelSpec, piece: &Piece) -> Range<usize> {
    match name {
        OUTPUT | OUTPUT_A => piece.heads.start * spec.head_dim..piece.heads.end * spec.head_dim,
        _ => piece.mlp.clone(),
    }
}

pub(super) fn param(name: &'static str, shape: &[usize], init: Init, shard: Shard) -> Param {
    Param { name, shape: shape.to_vec(), init, shard }
}

fn norm(spec: &ModelSpec, weight: &'static str, bias: &'static str) -> Vec<Param> {
    let mut params = vec![param(weight, &[spec.hidden], Init::Ones, Shard::Replicated)];
    if spec.norm == NormKind::Layer {
        params.push(param(bias, &[spec.hidden], Init::Zeros, Shard::Replicated));
    }
    params
}

pub(super) fn block(spec: &ModelSpec) -> Vec<Param> {
    let (d, f) = (spec.hidden, spec.mlp_width);
    let attended = spec.heads * spec.head_dim;
    let inner = Init::Normal(spec.init_std);
    // Outputs into the residual stream start smaller, so that its variance does not grow with depth (GPT-2).
    let residual = Init::Normal(spec.init_std / (2.0 * spec.layers as f64).sqrt());
    let mut params = vec![
        param(QKV, &[spec.qkv_width(), d], inner, Shard::Rows),
        param(OUTPUT, &[d, attended], residual, Shard::Columns),
        param(UP, &[spec.up_width(), d], inner, Shard::Rows),
        param(DOWN, &[d, f], residual, Shard::Columns),
    ];
    params.extend(norm(spec, NORM1, NORM1_BIAS));
    params.extend(norm(spec, NORM2, NORM2_BIAS));
    if spec.qkv_bias {
        params.push(param(QKV_BIAS, &[spec.qkv_width()], Init::Zeros, Shard::Rows));
    }
    if spec.output_bias {
        params.push(param(OUTPUT_BIAS, &[d], Init::Zeros, Shard::Replicated));
    }
    if spec.mlp_bias {
        params.push(param(UP_BIAS, &[spec.up_width()], Init::Zeros, Shard::Rows));
        params.push(param(DOWN_BIAS, &[d], Init::Zeros, Shard::Replicated));
    }
    params
}

pub(super) fn ends(spec: &ModelSpec, head: Head) -> Vec<Param> {
    let (d, e) = (spec.hidden, spec.embedding_width());
    let normal = Init::Normal(spec.init_std);
    let mut params = vec![param(EMBEDDING, &[spec.vocab_size, e], normal, Shard::Rows)];
    if let Some(rows) = spec.position_rows() {
        params.push(param(POSITIONS, &[rows, d], normal, Shard::Replicated));
    }
    if e != d {
        params.push(param(PROJECT_IN, &[d, e], normal, Shard::Replicated));
        params.push(param(PROJECT_OUT, &[e, d], normal, Shard::Replicated));
    }
    match head {
        Head::Language if !spec.tied => params.push(param(HEAD, &[spec.vocab_size, e], normal, Shard::Rows)),
        Head::Language => {}
        // A critic that starts at zero says nothing until it has learnt something.
        Head::Scalar => params.push(param(SCORE, &[1, e], Init::Zeros, Shard::Replicated)),
    }
    if spec.final_norm() {
        params.extend(norm(spec, FINAL_NORM, FINAL_NORM_BIAS));
    }
    params
}
