//! Blocks whose linear maps are kept in 8 bits: for models that are not trained.
//!
//! A matrix is kept as the kernels read it, with one scale for each of its rows (see [`PackedMatrix::int8`]); there is no other
//! copy of it. Norms and biases stay in bf16, and so does the unit of the ends: a table of embeddings is looked up, not
//! multiplied with, and a head is read by kernels that compute log-probabilities from its rows as they are, and errs in the
//! log-probability itself.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use tandem_kernels::gemm::{PackedMatrix, row_maxima};
use tandem_kernels::slice::{to_bf16, to_f32, with_slice};

use super::packed::PackedUnit;
use super::{ParamSlot, Shard, UnitBuffer, UnitId};
use crate::parallel::{Group, bytes};
use crate::{Error, Result};

fn is_matrix(slot: &ParamSlot) -> bool {
    slot.shape.len() == 2
}

impl UnitBuffer {
    /// These f32 weights with the matrices of a block in 8 bits, and all else in bf16. The scale of a row is that of the whole
    /// row, whose other parts the ranks of `tensor` have; all of them call it together.
    ///
    /// # Errors
    /// [`Error::Int8Weight`] if a weight is not a finite number; if ranks have lost each other.
    pub(crate) fn quantised(&self, tensor: &Group) -> Result<Self> {
        if !matches!(self.layout.id, UnitId::Block(_)) || self.layout.is_empty() {
            return self.narrowed();
        }
        let matrices: Vec<&ParamSlot> = self.layout.params.iter().filter(|slot| is_matrix(slot)).collect();
        let maxima = self.row_maxima(&matrices, tensor)?;
        let pack = |(slot, maxima): (&&ParamSlot, Vec<f32>)| {
            if let Some(row) = maxima.iter().position(|maximum| !maximum.is_finite()) {
                let (unit, name, value) = (self.layout.id, slot.name, maxima[row]);
                return Err(Error::Int8Weight { unit, name, row, value });
            }
            Ok((slot.offset, PackedMatrix::int8(&self.view(slot)?, &maxima)?))
        };
        let packed = matrices.iter().zip(maxima).map(pack).collect::<Result<Vec<_>>>()?;
        let (mut places, mut values) = (Vec::new(), Vec::new());
        with_slice(&self.flat, |flat| {
            for slot in self.layout.params.iter().filter(|slot| !is_matrix(slot)) {
                places.push((slot.offset, values.len()));
                values.extend_from_slice(&flat[slot.offset..slot.offset + slot.len()]);
            }
        })?;
        let len = values.len();
        let flat = to_bf16(&Tensor::from_vec(values, len, &Device::Cpu)?)?;
        let packed = PackedUnit { matrices: packed, others: Some(places), is_int8: true };
        Ok(Self { layout: self.layout.clone(), storage: flat.clone(), flat, packed: Some(Arc::new(packed)) })
    }

    /// The largest magnitudes in the rows of each matrix: of whole rows, also where several pieces share them.
    fn row_maxima(&self, matrices: &[&ParamSlot], tensor: &Group) -> Result<Vec<Vec<f32>>> {
        let mut maxima = matrices.iter().map(|slot| Ok(row_maxima(&self.view(slot)?)?)).collect::<Result<Vec<_>>>()?;
        if self.layout.cut.pieces == 1 {
            return Ok(maxima);
        }
        let is_shared = |slot: &ParamSlot| slot.shard == Shard::Columns;
        let mut names: Vec<&str> = matrices.iter().filter(|slot| is_shared(slot)).map(|slot| slot.name).collect();
        names.sort_unstable();
        names.dedup();
        for name in names {
            let pieces = || (0..matrices.len()).filter(|index| matrices[*index].name == name);
            let mut whole: Vec<f32> = Vec::new();
            for index in pieces() {
                take_larger(&mut whole, &maxima[index]);
            }
            if !self.layout.cut.is_whole() {
                let mut message = Vec::new();
                bytes::append(&whole, &mut message);
                for part in tensor.gather("largest weights of rows", &message)? {
                    let mut values = vec![0f32; part.len() / 4];
                    bytes::fill(&mut values, &part);
                    take_larger(&mut whole, &values);
                }
            }
            for index in pieces() {
                maxima[index].clone_from(&whole);
            }
        }
        Ok(maxima)
    }

    /// Whether matrices are kept in 8 bits.
    pub(crate) fn is_int8(&self) -> bool {
        self.packed.as_ref().is_some_and(|packed| packed.is_int8)
    }

    /// The weights that are multiplied with, in f32, in the flat buffer of the layout.
    pub(super) fn dequantised(&self) -> Result<Self> {
        let mut flat = vec![0f32; self.layout.len()];
        for slot in &self.layout.params {
            let values = match self.packed.as_ref().and_then(|packed| packed.find(slot.offset)) {
                Some(matrix) => matrix.dequantised()?,
                None => Some(to_f32(&self.view(slot)?)?),
            };
            let Some(values) = values else { return Err(Error::KeptInt8 { unit: self.layout.id, name: slot.name }) };
            with_slice(&values, |values| flat[slot.offset..slot.offset + slot.len()].copy_from_slice(values))?;
        }
        Self::from_vec(&self.layout, flat)
    }
}

/// The larger of each two magnitudes; NaN is larger than any number, as its bits are.
fn take_larger(into: &mut Vec<f32>, from: &[f32]) {
    into.resize(from.len(), 0.0);
    for (into, from) in into.iter_mut().zip(from) {
        *into = f32::from_bits(into.to_bits().max(from.to_bits()));
    }
}
