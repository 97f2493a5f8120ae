//! The flat buffer of a unit: its weights, its gradients or an optimizer moment.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use half::bf16;
use tandem_kernels::rng::{Philox, Purpose};
use tandem_kernels::slice::{narrow_slice, to_bf16, to_f32, with_slice, with_slice_mut_of, zeros};

use super::packed::PackedUnit;
use super::{Init, UnitLayout};
use crate::{Error, Result};

/// A flat buffer with a unit's layout: its weights, its gradients or an optimizer moment, in f32; or the weights in the
/// format that passes compute in.
#[derive(Clone, Debug)]
pub struct UnitBuffer {
    pub(super) layout: Arc<UnitLayout>,
    pub(super) flat: Tensor,
    /// What `flat` lies at the beginning of.
    pub(super) storage: Tensor,
    /// Matrices packed for products with few rows, or kept in 8 bits.
    pub(super) packed: Option<Arc<PackedUnit>>,
}

impl UnitBuffer {
    /// A buffer of zeros.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn zeros(layout: &Arc<UnitLayout>) -> Result<Self> {
        Self::zeros_padded(layout, layout.len())
    }

    /// A buffer of zeros in a storage of `padded` elements.
    ///
    /// # Errors
    /// If the memory cannot be had or is less than the layout needs.
    pub fn zeros_padded(layout: &Arc<UnitLayout>, padded: usize) -> Result<Self> {
        Self::on(layout, zeros(padded, DType::F32)?)
    }

    /// A buffer of zeros of this element type.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub(crate) fn zeros_of(layout: &Arc<UnitLayout>, dtype: DType) -> Result<Self> {
        Self::on(layout, zeros(layout.len(), dtype)?)
    }

    /// A buffer at the beginning of `storage`, which it shares.
    ///
    /// # Errors
    /// If the storage has fewer elements than the layout.
    pub fn on(layout: &Arc<UnitLayout>, storage: Tensor) -> Result<Self> {
        if storage.elem_count() < layout.len() {
            return Err(Error::BufferLength { unit: layout.id, expected: layout.len(), got: storage.elem_count() });
        }
        let flat =
            if storage.elem_count() == layout.len() { storage.clone() } else { storage.narrow(0, 0, layout.len())? };
        Ok(Self { layout: layout.clone(), flat, storage, packed: None })
    }

    /// Initial weights: each parameter drawn at its own address, so that a unit does not depend on the others.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn initial(layout: &Arc<UnitLayout>, seed: u64) -> Result<Self> {
        let philox = Philox::new(seed, Purpose::Init, 0);
        let unit = layout.id.index() as u64;
        let mut flat = vec![0f32; layout.len()];
        for (index, slot) in layout.params.iter().enumerate() {
            let values = &mut flat[slot.offset..slot.offset + slot.len()];
            match slot.init {
                Init::Zeros => {}
                Init::Ones => values.fill(1.0),
                Init::Uniform(bound) => {
                    for (element, value) in values.iter_mut().enumerate() {
                        let draw = philox.uniform(unit << 16 | 1 << 15 | index as u64, element as u32, 0);
                        *value = ((2.0 * draw - 1.0) * bound) as f32;
                    }
                }
                Init::Normal(std) => philox.fill_normal(unit << 16 | index as u64, 0, std, values),
            }
        }
        Self::from_vec(layout, flat)
    }

    /// A buffer of given elements.
    ///
    /// # Errors
    /// If their number is not the layout's.
    pub fn from_vec(layout: &Arc<UnitLayout>, flat: Vec<f32>) -> Result<Self> {
        if flat.len() != layout.len() {
            return Err(Error::BufferLength { unit: layout.id, expected: layout.len(), got: flat.len() });
        }
        let len = flat.len();
        Self::on(layout, Tensor::from_vec(flat, len, &Device::Cpu)?)
    }

    /// A deep copy, with the padding that slices of it need.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn duplicate(&self) -> Result<Self> {
        if self.is_int8() {
            // Nothing ever changes it.
            return Ok(self.clone());
        }
        Self::on(&self.layout, self.storage.copy()?)
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.flat.dtype()
    }

    /// The numbers in bf16, rounded to nearest, without padding.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn narrowed(&self) -> Result<Self> {
        Self::on(&self.layout, to_bf16(&self.flat)?)
    }

    /// The numbers in f32; the same storage if they are that already. Of matrices in 8 bits, what is multiplied with.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn widened(&self) -> Result<Self> {
        if self.is_int8() {
            return self.dequantised();
        }
        if self.dtype() == DType::F32 { Ok(self.clone()) } else { Self::on(&self.layout, to_f32(&self.flat)?) }
    }

    /// Overwrites this bf16 buffer with the numbers of `wide`, an f32 buffer of the same layout, rounded to nearest.
    ///
    /// # Errors
    /// If the lengths differ.
    pub(crate) fn narrow_from(&self, wide: &UnitBuffer) -> Result<()> {
        let narrow = |from: &[f32]| with_slice_mut_of(&self.flat, |into: &mut [bf16]| narrow_slice(from, into));
        Ok(with_slice(&wide.flat, narrow)???)
    }

    /// The layout.
    pub fn layout(&self) -> &Arc<UnitLayout> {
        &self.layout
    }

    /// All elements, `[len]`.
    pub fn flat(&self) -> &Tensor {
        &self.flat
    }

    /// All elements and the padding behind them.
    pub(crate) fn storage(&self) -> &Tensor {
        &self.storage
    }

    /// View of the parameter `name`, sharing the buffer's storage.
    ///
    /// # Errors
    /// If the unit has no such parameter.
    pub fn get(&self, name: &str) -> Result<Tensor> {
        self.find(name)?.ok_or_else(|| Error::NoParameter { unit: self.layout.id, name: name.to_string() })
    }

    /// View of the parameter `name`, or `None` if the unit has none of that name.
    ///
    /// # Errors
    /// If the tensor library refuses the view.
    pub fn find(&self, name: &str) -> Result<Option<Tensor>> {
        self.layout.slot(name).map(|slot| self.view(slot)).transpose()
    }

    /// As [`Self::get`], of one piece.
    ///
    /// # Errors
    /// If the piece has no such parameter.
    pub fn get_of(&self, piece: usize, name: &str) -> Result<Tensor> {
        self.find_of(piece, name)?
            .ok_or_else(|| Error::NoParameter { unit: self.layout.id, name: format!("{name} of piece {piece}") })
    }

    /// As [`Self::find`], of one piece.
    ///
    /// # Errors
    /// If the tensor library refuses the view.
    pub fn find_of(&self, piece: usize, name: &str) -> Result<Option<Tensor>> {
        self.layout.slot_of(piece, name).map(|slot| self.view(slot)).transpose()
    }

    /// Overwrites every element with zero, in place.
    ///
    /// # Errors
    /// If the tensor library refuses.
    pub fn clear(&self) -> Result<()> {
        Ok(self.flat.zero_set()?)
    }
}
