//! Parameters of adapters: which linear maps of a block can have one, and how they are cut with them.
//!
//! An adapter of `W [out, in]` is a pair `A [r, in]`, `B [out, r]`. Where tensor parallelism cuts `W` along its outputs, `B` is
//! cut with it and all pieces share `A`; where it cuts `W` along its inputs, `A` is cut with it and all share `B`.

use std::ops::Range;

use super::layout::{Param, param};
use super::{
    DOWN, DOWN_A, DOWN_B, GATE_A, GATE_B, Head, Init, KEY_A, KEY_B, OUTPUT, OUTPUT_A, OUTPUT_B, Piece, QKV, QKV_A,
    QKV_B, QUERY_A, QUERY_B, SCORE, Shard, UP, UP_A, UP_B, VALUE_A, VALUE_B,
};
use crate::model::names::Part;
use crate::model::spec::ModelSpec;

/// A linear map of a block, or a part of a fused one, that can have an adapter.
#[derive(Debug, PartialEq, Eq)]
pub struct AdapterSite {
    /// Its place among the adapters of a block, below 8: tells its dropout from that of others.
    pub(crate) number: u16,
    /// The parameter that holds the map's weights.
    pub(crate) weight: &'static str,
    /// Which of its rows are the map's.
    pub(crate) part: Part,
    /// Name of `A`.
    pub(crate) a: &'static str,
    /// Name of `B`.
    pub(crate) b: &'static str,
}

const fn site(number: u16, weight: &'static str, part: Part, [a, b]: [&'static str; 2]) -> AdapterSite {
    AdapterSite { number, weight, part, a, b }
}

/// Every linear map that can have an adapter. Families that fuse projections in their files have one for the fused map.
pub(crate) static SITES: [AdapterSite; 9] = [
    site(0, QKV, Part::Whole, [QKV_A, QKV_B]),
    site(0, QKV, Part::Query, [QUERY_A, QUERY_B]),
    site(1, QKV, Part::Key, [KEY_A, KEY_B]),
    site(2, QKV, Part::Value, [VALUE_A, VALUE_B]),
    site(3, OUTPUT, Part::Whole, [OUTPUT_A, OUTPUT_B]),
    site(4, UP, Part::Gate, [GATE_A, GATE_B]),
    site(5, UP, Part::Whole, [UP_A, UP_B]),
    site(5, UP, Part::Up, [UP_A, UP_B]),
    site(6, DOWN, Part::Whole, [DOWN_A, DOWN_B]),
];

/// The adapters that every block of a model has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterSet {
    /// Columns of `B`, rows of `A`.
    pub(crate) rank: usize,
    /// The linear maps, in the order of [`SITES`].
    pub(crate) sites: Vec<&'static AdapterSite>,
    /// What the model computes: a scalar head, which no adapter could bring up from zero, is trained along.
    pub(crate) head: Head,
}

impl AdapterSite {
    /// The rows of the map in what `piece` holds of its parameter.
    pub(crate) fn rows(&self, spec: &ModelSpec, piece: &Piece) -> Range<usize> {
        let (query, key) = (piece.heads.len() * spec.head_dim, piece.kv_heads.len() * spec.head_dim);
        let mlp = piece.mlp.len();
        match (self.part, self.weight) {
            (Part::Query, _) => 0..query,
            (Part::Key, _) => query..query + key,
            (Part::Value, _) => query + key..query + 2 * key,
            (Part::Gate, _) => 0..mlp,
            (Part::Up, _) => mlp..2 * mlp,
            (Part::Whole, QKV) => 0..query + 2 * key,
            (Part::Whole, UP) => 0..if spec.gated { 2 * mlp } else { mlp },
            (Part::Whole, _) => 0..spec.hidden,
        }
    }

    /// Outputs and inputs of the map.
    pub(crate) fn shape(&self, spec: &ModelSpec) -> [usize; 2] {
        let attended = spec.heads * spec.head_dim;
        let (rows, inputs) = match self.weight {
            QKV => (spec.qkv_width(), spec.hidden),
            UP => (spec.up_width(), spec.hidden),
            OUTPUT => (spec.hidden, attended),
            _ => (spec.hidden, spec.mlp_width),
        };
        [self.part.range(spec, rows).1, inputs]
    }
}

impl AdapterSet {
    /// The adapters of the parameter `weight`.
    pub(crate) fn of(&self, weight: &str) -> impl Iterator<Item = &'static AdapterSite> {
        self.sites.iter().copied().filter(move |site| site.weight == weight)
    }

    pub(super) fn block(&self, spec: &ModelSpec) -> Vec<Param> {
        let mut params = Vec::new();
        for site in &self.sites {
            let [outputs, inputs] = site.shape(spec);
            let (shard_a, shard_b) = match site.weight {
                QKV | UP => (Shard::Replicated, Shard::Rows),
                _ => (Shard::Columns, Shard::Replicated),
            };
            // Kaiming-uniform with a = √5, as PEFT and torch's own linear maps start: √(6 / ((1 + a²) · inputs)).
            let bound = 1.0 / (inputs as f64).sqrt();
            params.push(param(site.a, &[self.rank, inputs], Init::Uniform(bound), shard_a));
            params.push(param(site.b, &[outputs, self.rank], Init::Zeros, shard_b));
        }
        params
    }

    pub(super) fn ends(&self, spec: &ModelSpec) -> Vec<Param> {
        match self.head {
            Head::Language => Vec::new(),
            Head::Scalar => vec![param(SCORE, &[1, spec.embedding_width()], Init::Zeros, Shard::Replicated)],
        }
    }
}
