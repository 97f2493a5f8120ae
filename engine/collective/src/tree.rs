//! The one order in which ranks are added up.
//!
//! `tree(lo..hi)` is the value of `lo` if it is alone, else `tree(lo..mid) + tree(mid..hi)` where `mid - lo` is the largest
//! power of two below `hi - lo`. Four ranks give `(0+1)+(2+3)`, three `(0+1)+2`. Aligned groups of `2^k` ranks are subtrees,
//! so adding up inside such groups first changes no bit.

use std::ops::Range;

use half::bf16;

use crate::bytes::Plain;

/// One reduction: how numbers are widened, joined and narrowed again.
pub(crate) trait Reduction: 'static {
    /// What the ranks bring.
    type Item: Plain;
    /// In what they are joined.
    type Wide: Copy + Default + 'static;

    fn widen(item: Self::Item) -> Self::Wide;
    fn join(left: Self::Wide, right: Self::Wide) -> Self::Wide;
    fn narrow(wide: Self::Wide) -> Self::Item;
}

pub(crate) struct SumF32;
pub(crate) struct SumF64;
pub(crate) struct MaxF64;
pub(crate) struct SumBf16;

impl Reduction for SumF32 {
    type Item = f32;
    type Wide = f32;

    fn widen(item: f32) -> f32 {
        item
    }
    fn join(left: f32, right: f32) -> f32 {
        left + right
    }
    fn narrow(wide: f32) -> f32 {
        wide
    }
}

impl Reduction for SumF64 {
    type Item = f64;
    type Wide = f64;

    fn widen(item: f64) -> f64 {
        item
    }
    fn join(left: f64, right: f64) -> f64 {
        left + right
    }
    fn narrow(wide: f64) -> f64 {
        wide
    }
}

impl Reduction for MaxF64 {
    type Item = f64;
    type Wide = f64;

    fn widen(item: f64) -> f64 {
        item
    }
    fn join(left: f64, right: f64) -> f64 {
        max_f64(left, right)
    }
    fn narrow(wide: f64) -> f64 {
        wide
    }
}

impl Reduction for SumBf16 {
    type Item = bf16;
    type Wide = f32;

    fn widen(item: bf16) -> f32 {
        f32::from_bits(u32::from(item.to_bits()) << 16)
    }
    fn join(left: f32, right: f32) -> f32 {
        left + right
    }
    /// Round to nearest, ties to even, without a branch: `half`'s own conversion does not vectorise.
    fn narrow(wide: f32) -> bf16 {
        let bits = wide.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let quiet = (bits >> 16) | 0x40;
        bf16::from_bits(if wide.is_nan() { quiet } else { rounded } as u16)
    }
}

/// The greater of two; NaN if either is, and `+0.0` over `-0.0`, so that the result does not depend on the order.
pub fn max_f64(left: f64, right: f64) -> f64 {
    if left.is_nan() || right.is_nan() {
        f64::NAN
    } else if left == right {
        // Equal numbers have equal bits, but for the sign of zero.
        f64::from_bits(left.to_bits() & right.to_bits())
    } else if left > right {
        left
    } else {
        right
    }
}

/// Where the tree over `lo..hi` (two ranks or more) is cut.
pub(crate) fn middle(lo: usize, hi: usize) -> usize {
    let mut half = 1;
    while half * 2 < hi - lo {
        half *= 2;
    }
    lo + half
}

macro_rules! tree_functions {
    ($($(#[$doc:meta])* $name:ident, $reduction:ty, $number:ty;)*) => {
        $($(#[$doc])*
        ///
        /// # Panics
        /// If there are no parts, or a length differs from that of `out`.
        pub fn $name(parts: &[&[$number]], out: &mut [$number]) {
            reduce_slices::<$reduction>(parts, out);
        })*
    };
}
tree_functions! {
    /// Writes the element-wise tree sum of `parts` to `out`: what an all_reduce over `parts.len()` ranks gives.
    tree_sum, SumF32, f32;
    /// [`tree_sum`] in f64.
    tree_sum_f64, SumF64, f64;
    /// The element-wise maximum along the tree, see [`max_f64`].
    tree_max_f64, MaxF64, f64;
    /// [`tree_sum`] of bf16: summed in f32, rounded once, to nearest, ties to even.
    tree_sum_bf16, SumBf16, bf16;
}

fn reduce_slices<R: Reduction<Item: Default>>(parts: &[&[R::Item]], out: &mut [R::Item]) {
    assert!(!parts.is_empty(), "a reduction of no parts");
    assert!(parts.iter().all(|part| part.len() == out.len()), "a reduction of parts of different lengths");
    reduce_blocks::<R>(
        parts.len(),
        out.len(),
        |part, range| &parts[part][range],
        |range, block| {
            out[range].copy_from_slice(block);
        },
    );
}

/// Elements reduced at a time: the blocks of eight ranks fit a level-two cache, the partial sums a level-one cache.
pub(crate) const BLOCK: usize = 2048;

/// Reduces elements `0..length` of `parts` buffers block by block: `read(part, range)` gives the inputs, `write(range,
/// block)` gets the results.
pub(crate) fn reduce_blocks<'a, R: Reduction>(
    parts: usize,
    length: usize,
    read: impl Fn(usize, Range<usize>) -> &'a [R::Item],
    mut write: impl FnMut(Range<usize>, &[R::Item]),
) where
    R::Item: Default,
{
    let mut wide = vec![R::Wide::default(); BLOCK * (1 + parts.next_power_of_two().trailing_zeros() as usize)];
    let mut narrow = [R::Item::default(); BLOCK];
    for start in (0..length).step_by(BLOCK) {
        let range = start..length.min(start + BLOCK);
        let size = range.len();
        let out = &mut narrow[..size];
        let at = |part| &read(part, range.clone())[..size];
        match parts {
            1 => out.copy_from_slice(at(0)),
            2 => {
                let (a, b) = (at(0), at(1));
                for i in 0..size {
                    out[i] = R::narrow(R::join(R::widen(a[i]), R::widen(b[i])));
                }
            }
            3 => {
                let (a, b, c) = (at(0), at(1), at(2));
                for i in 0..size {
                    out[i] = R::narrow(R::join(R::join(R::widen(a[i]), R::widen(b[i])), R::widen(c[i])));
                }
            }
            4 => {
                let (a, b, c, d) = (at(0), at(1), at(2), at(3));
                for i in 0..size {
                    let left = R::join(R::widen(a[i]), R::widen(b[i]));
                    let right = R::join(R::widen(c[i]), R::widen(d[i]));
                    out[i] = R::narrow(R::join(left, right));
                }
            }
            _ => {
                reduce_range::<R>(0, parts, size, &at, &mut wide);
                for i in 0..size {
                    out[i] = R::narrow(wide[i]);
                }
            }
        }
        write(range, out);
    }
}

/// `tree(lo..hi)` of one block into the first `size` of `wide`, the rest of which is scratch.
fn reduce_range<'a, R: Reduction>(
    lo: usize,
    hi: usize,
    size: usize,
    at: &impl Fn(usize) -> &'a [R::Item],
    wide: &mut [R::Wide],
) {
    match hi - lo {
        1 => {
            let out = &mut wide[..size];
            let a = at(lo);
            for i in 0..size {
                out[i] = R::widen(a[i]);
            }
        }
        2 => {
            let out = &mut wide[..size];
            let (a, b) = (at(lo), at(lo + 1));
            for i in 0..size {
                out[i] = R::join(R::widen(a[i]), R::widen(b[i]));
            }
        }
        _ => {
            let mid = middle(lo, hi);
            reduce_range::<R>(lo, mid, size, at, wide);
            let (out, scratch) = wide.split_at_mut(BLOCK);
            reduce_range::<R>(mid, hi, size, at, scratch);
            for i in 0..size {
                out[i] = R::join(out[i], scratch[i]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn naive(values: &[f32]) -> f32 {
        match values {
            [one] => *one,
            _ => {
                let mid = middle(0, values.len());
                naive(&values[..mid]) + naive(&values[mid..])
            }
        }
    }

    #[test]
    fn the_tree_is_cut_at_powers_of_two() {
        let cuts: Vec<_> = (2..=9).map(|world| middle(0, world)).collect();
        assert_eq!(cuts, [1, 2, 2, 4, 4, 4, 4, 8]);
        let [a, b, c] = [1.0e8_f32, -1.0e8, 1.5e-3];
        let mut out = [0.0];
        tree_sum(&[&[c], &[a], &[b]], &mut out);
        assert_eq!(out[0], (c + a) + b);
        assert_ne!(out[0], c + (a + b), "the example must be able to tell orders apart");
    }

    #[test]
    fn blocks_give_the_bits_of_the_naive_fold() {
        for parts in 1..=17 {
            let data: Vec<Vec<f32>> = (0..parts)
                .map(|part| {
                    (0..BLOCK + 5)
                        .map(|i| ((i * 7919 + part * 104_729) % 1009) as f32 * 1.7e-3 * 3f32.powi(part as i32))
                        .collect()
                })
                .collect();
            let views: Vec<&[f32]> = data.iter().map(Vec::as_slice).collect();
            let mut out = vec![0.0; BLOCK + 5];
            tree_sum(&views, &mut out);
            for i in 0..out.len() {
                let column: Vec<f32> = data.iter().map(|part| part[i]).collect();
                assert_eq!(out[i].to_bits(), naive(&column).to_bits(), "{parts} parts, element {i}");
            }
        }
    }

    #[test]
    fn narrowing_rounds_as_half_does() {
        for high in (0..=u16::MAX).step_by(7) {
            for low in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let wide = f32::from_bits(u32::from(high) << 16 | low);
                assert_eq!(SumBf16::narrow(wide).to_bits(), bf16::from_f32(wide).to_bits(), "{wide:e}");
            }
        }
    }

    #[test]
    fn the_maximum_does_not_depend_on_the_order() {
        assert!(max_f64(f64::NAN, 1.0).is_nan() && max_f64(1.0, f64::NAN).is_nan());
        assert_eq!(max_f64(-0.0, 0.0).to_bits(), 0.0_f64.to_bits());
        assert_eq!(max_f64(0.0, -0.0).to_bits(), 0.0_f64.to_bits());
        assert_eq!(max_f64(-3.0, -2.0), -2.0);
        assert_eq!(max_f64(-3.0, -3.0), -3.0);
    }
}
