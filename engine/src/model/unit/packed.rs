//! A unit's matrices as products with few rows read them: beside the plain ones, or instead of them.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use half::bf16;
use tandem_kernels::gemm::PackedMatrix;
use tandem_kernels::slice::with_slice_of;

use super::{EMBEDDING, HEAD, POSITIONS, ParamSlot, SCORE, UnitBuffer};
use crate::{Error, Result};

/// Packed matrices of a unit.
#[derive(Debug)]
pub(super) struct PackedUnit {
    /// By offset in the layout.
    pub(super) matrices: Vec<(usize, PackedMatrix)>,
    /// If the buffer does not hold these matrices: where the other parameters lie in it, by offset in the layout.
    pub(super) others: Option<Vec<(usize, usize)>>,
    /// Whether the matrices are in 8 bits, from which the weights cannot be had again.
    pub(super) is_int8: bool,
}

impl PackedUnit {
    pub(super) fn find(&self, offset: usize) -> Option<&PackedMatrix> {
        self.matrices.iter().find(|(of, _)| *of == offset).map(|(_, matrix)| matrix)
    }
}

impl UnitBuffer {
    /// The same weights with their matrices packed beside them.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub(crate) fn packed(&self) -> Result<Self> {
        if self.is_int8() {
            return Ok(self.clone());
        }
        // A table of embeddings is looked up, unless it is the head too.
        let has = |name| self.layout.params.iter().any(|slot| slot.name == name);
        let is_looked_up = |name| name == POSITIONS || name == EMBEDDING && (has(HEAD) || has(SCORE));
        let matrices = self.layout.params.iter().filter(|slot| slot.shape.len() == 2 && !is_looked_up(slot.name));
        let pack = |slot: &ParamSlot| Ok((slot.offset, PackedMatrix::new(&self.view(slot)?)?));
        let matrices = matrices.map(pack).collect::<Result<_>>()?;
        Ok(Self { packed: Some(Arc::new(PackedUnit { matrices, others: None, is_int8: false })), ..self.clone() })
    }

    /// The same bf16 weights with their matrices packed, without the plain ones. Who asks for one of these gets it unpacked,
    /// into memory of its own; [`Self::flat`] holds the other parameters only.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub(crate) fn packed_instead(&self) -> Result<Self> {
        let matrices = match self.packed()?.packed.and_then(Arc::into_inner) {
            Some(PackedUnit { matrices, .. }) => matrices,
            None => Vec::new(),
        };
        let (mut values, mut others) = (Vec::<bf16>::new(), Vec::new());
        for slot in &self.layout.params {
            if !matrices.iter().any(|(offset, _)| *offset == slot.offset) {
                others.push((slot.offset, values.len()));
                with_slice_of(&self.view(slot)?, |from: &[bf16]| values.extend_from_slice(from))?;
            }
        }
        let len = values.len();
        let flat = Tensor::from_vec(values, len, &Device::Cpu)?;
        let packed = Some(Arc::new(PackedUnit { matrices, others: Some(others), is_int8: false }));
        Ok(Self { layout: self.layout.clone(), storage: flat.clone(), flat, packed })
    }

    /// Whether the buffer holds all parameters as the layout says.
    pub(crate) fn is_plain(&self) -> bool {
        self.packed.as_ref().is_none_or(|packed| packed.others.is_none())
    }

    /// The same weights in a buffer that holds all of them as the layout says: itself, or a new one. Weights in 8 bits stay as
    /// they are.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub(crate) fn plain(&self) -> Result<Self> {
        if self.is_int8() {
            return Ok(self.clone());
        }
        if self.is_plain() {
            return Ok(Self { packed: None, ..self.clone() });
        }
        let mut values = vec![bf16::ZERO; self.layout.len()];
        for slot in &self.layout.params {
            let into = &mut values[slot.offset..][..slot.len()];
            with_slice_of(&self.view(slot)?, |from: &[bf16]| into.copy_from_slice(from))?;
        }
        let len = values.len();
        Self::on(&self.layout, Tensor::from_vec(values, len, &Device::Cpu)?)
    }

    /// The parameter `name` of a piece, packed; `None` if it is not.
    pub(crate) fn packed_of(&self, piece: usize, name: &str) -> Option<&PackedMatrix> {
        self.packed.as_deref()?.find(self.layout.slot_of(piece, name)?.offset)
    }

    /// Bytes of memory: of all elements, or of what is kept of them, and of packed matrices.
    pub fn size_bytes(&self) -> usize {
        let packed = self.packed.iter().flat_map(|packed| &packed.matrices).map(|(_, matrix)| matrix.size_bytes());
        self.storage.elem_count() * self.dtype().size_in_bytes() + packed.sum::<usize>()
    }

    /// View of a parameter, sharing the buffer's storage; or, if it is held packed only, a copy.
    pub(super) fn view(&self, slot: &ParamSlot) -> Result<Tensor> {
        let mut offset = slot.offset;
        if let Some(packed) = self.packed.as_deref()
            && let Some(others) = &packed.others
        {
            if let Some(matrix) = packed.find(slot.offset) {
                let hidden = Error::KeptInt8 { unit: self.layout.id, name: slot.name };
                return if packed.is_int8 { Err(hidden) } else { Ok(matrix.unpacked()?) };
            }
            offset = others.iter().find(|(of, _)| *of == slot.offset).map_or(offset, |(_, at)| *at);
        }
        Ok(self.flat.narrow(0, offset, slot.len())?.reshape(slot.shape.as_slice())?)
    }
}
