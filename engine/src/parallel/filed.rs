//! Weights that nobody trains, in memory or in a file, out of which a pass reads each unit when it comes to it.

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use half::bf16;
use tandem_kernels::slice::{with_slice, with_slice_of};

use super::slice::SliceBuffer;
use super::words::{halves, halves_mut};
use crate::Result;
use crate::model::unit::{UnitBuffer, UnitLayout};

/// Where the weights of a unit are.
#[derive(Debug)]
pub(super) enum Master {
    Memory(UnitBuffer),
    File(Filed),
}

impl Master {
    /// The weights: those in memory themselves, of those in a file a copy.
    pub(super) fn read(&self) -> Result<UnitBuffer> {
        match self {
            Master::Memory(unit) => Ok(unit.clone()),
            Master::File(filed) => filed.read(),
        }
    }

    /// The layout of the unit.
    pub(super) fn layout(&self) -> &Arc<UnitLayout> {
        match self {
            Master::Memory(unit) => unit.layout(),
            Master::File(filed) => &filed.layout,
        }
    }

    /// The element type.
    pub(super) fn dtype(&self) -> DType {
        match self {
            Master::Memory(unit) => unit.dtype(),
            Master::File(filed) => filed.dtype,
        }
    }
}

/// The weights of a unit in a file, in f32 or bf16.
#[derive(Debug)]
pub(super) struct Filed {
    layout: Arc<UnitLayout>,
    dtype: DType,
    /// The numbers; of bf16 two in each word.
    words: SliceBuffer,
}

impl Filed {
    /// Writes a unit to a file in `dir`.
    pub(super) fn of(unit: &UnitBuffer, dir: &Path) -> Result<Self> {
        let (layout, dtype, len) = (unit.layout().clone(), unit.dtype(), unit.flat().elem_count());
        let words = if dtype == DType::F32 {
            let mut words = SliceBuffer::zeros(len, Some(dir))?;
            with_slice(unit.flat(), |from| words.copy_from_slice(from))?;
            words
        } else {
            let mut words = SliceBuffer::zeros(len.div_ceil(2), Some(dir))?;
            with_slice_of(unit.flat(), |from: &[bf16]| halves_mut(&mut words)[..len].copy_from_slice(from))?;
            words
        };
        words.let_go();
        Ok(Self { layout, dtype, words })
    }

    /// The unit, in memory of its own.
    fn read(&self) -> Result<UnitBuffer> {
        let len = self.layout.len();
        let flat = if self.dtype == DType::F32 {
            Tensor::from_slice(&self.words[..len], len, &Device::Cpu)?
        } else {
            Tensor::from_slice(&halves(&self.words)[..len], len, &Device::Cpu)?
        };
        self.words.let_go();
        UnitBuffer::on(&self.layout, flat)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parallel::weights::tests::layouts;

    #[test]
    fn a_file_gives_back_what_was_written() {
        let dir = tempfile::tempdir().unwrap();
        for layout in layouts() {
            let wide = UnitBuffer::initial(&layout, 3).unwrap();
            let filed = Filed::of(&wide, dir.path()).unwrap();
            assert!(matches!(filed.words, SliceBuffer::File(_)));
            let read = filed.read().unwrap();
            assert_eq!(read.flat().to_vec1::<f32>().unwrap(), wide.flat().to_vec1::<f32>().unwrap());
            let narrow = wide.narrowed().unwrap();
            let master = Master::File(Filed::of(&narrow, dir.path()).unwrap());
            assert_eq!((master.dtype(), master.layout()), (DType::BF16, &layout));
            let read = master.read().unwrap();
            assert_eq!(read.flat().to_vec1::<bf16>().unwrap(), narrow.flat().to_vec1::<bf16>().unwrap());
        }
    }
}
