//! Numbers seen as bytes and back, for calls that only move them.

use half::bf16;

mod sealed {
    pub trait Sealed {}
}

/// Numbers without padding for which every bit pattern is valid.
pub trait Plain: sealed::Sealed + Copy + Send + Sync + 'static {}

macro_rules! plain {
    ($($number:ty),*) => {
        $(impl sealed::Sealed for $number {}
        impl Plain for $number {})*
    };
}
plain!(u8, u16, u32, u64, i8, i16, i32, i64, f32, f64, bf16);

/// The bytes of `values`, in this machine's order.
pub fn as_bytes<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: `Plain` has no padding, u8 needs no alignment, and the lifetime is that of `values`.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// The bytes of `values`, to write; any bytes are valid values.
pub fn as_bytes_mut<T: Plain>(values: &mut [T]) -> &mut [u8] {
    // SAFETY: as in `as_bytes`; every bit pattern is a valid `T`.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_numbers_are_the_same_memory() {
        let mut values = [1.0_f32, -2.5];
        assert_eq!(as_bytes(&values)[4..], (-2.5_f32).to_ne_bytes());
        as_bytes_mut(&mut values)[..4].copy_from_slice(&7.25_f32.to_ne_bytes());
        assert_eq!(values, [7.25, -2.5]);
        assert!(as_bytes::<f64>(&[]).is_empty());
    }
}
