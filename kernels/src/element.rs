//! The element types that kernels store, and how they become the f32 that all arithmetic is done in.

use candle_core::{CpuStorage, WithDType};
use half::bf16;

/// A stored number: f32, or bf16, its upper half.
///
/// Kernels read an element as f32, compute in f32 and round once, when the result is stored. The dtype of a tensor chooses
/// the kernel.
pub trait Element: WithDType + sealed::Sealed {
    /// The number, exactly.
    fn wide(self) -> f32;

    /// The nearest number of this type, ties to even; NaN stays NaN.
    fn narrow(value: f32) -> Self;

    /// A row as f32: itself, or a copy in `scratch`.
    #[doc(hidden)]
    fn wide_row<'a>(row: &'a [Self], scratch: &'a mut Vec<f32>) -> &'a [f32];

    /// The elements of a storage for writing, if it is of this type.
    #[doc(hidden)]
    fn slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]>;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::bf16 {}
}

impl Element for f32 {
    #[inline(always)]
    fn wide(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        value
    }

    #[inline(always)]
    fn wide_row<'a>(row: &'a [f32], _: &'a mut Vec<f32>) -> &'a [f32] {
        row
    }

    fn slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]> {
        match storage {
            CpuStorage::F32(values) => Some(values),
            _ => None,
        }
    }
}

impl Element for bf16 {
    // Not the conversions of `half`: their branches on NaN keep loops from being vectorised.
    #[inline(always)]
    fn wide(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let quiet = (bits >> 16) | 0x40;
        bf16::from_bits(if value.is_nan() { quiet } else { rounded } as u16)
    }

    #[inline(always)]
    fn wide_row<'a>(row: &'a [bf16], scratch: &'a mut Vec<f32>) -> &'a [f32] {
        scratch.resize(row.len(), 0.0);
        for (wide, value) in scratch.iter_mut().zip(row) {
            *wide = value.wide();
        }
        scratch
    }

    fn slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]> {
        match storage {
            CpuStorage::BF16(values) => Some(values),
            _ => None,
        }
    }
}

/// Runs `$body` with `$element` naming the element type of `$dtype`, or fails for a type without kernels.
///
/// `with_element!(OP, tensor.dtype(), E => kernel::<E>(…))`
macro_rules! with_element {
    ($op:expr, $dtype:expr, $element:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $element = f32;
                $body
            }
            candle_core::DType::BF16 => {
                type $element = half::bf16;
                $body
            }
            dtype => Err($crate::Error::Dtype { op: $op, dtype }),
        }
    };
}
pub(crate) use with_element;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_that_of_half_for_every_upper_half_and_around_every_tie() {
        for upper in 0..=u16::MAX {
            for lower in [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let value = f32::from_bits(u32::from(upper) << 16 | lower);
                let (got, want) = (<bf16 as Element>::narrow(value), bf16::from_f32(value));
                assert_eq!(got.is_nan(), value.is_nan(), "{:08x}", value.to_bits());
                assert!(got.is_nan() || got.to_bits() == want.to_bits(), "{:08x}", value.to_bits());
            }
            let stored = bf16::from_bits(upper);
            assert!(stored.is_nan() || stored.wide().to_bits() == stored.to_f32().to_bits());
        }
    }
}
