//! Reductions against the serial fold.

use half::bf16;

use super::{LENGTHS, Number, Suite, fold, sum_of, values};
use crate::error::Result;
use crate::tag::Tag;

impl Suite<'_> {
    pub(super) fn reductions(&self) {
        for (salt, length) in LENGTHS.into_iter().enumerate() {
            self.sum("all_reduce_sum_f32", salt, length, |tag, values: &mut [f32]| {
                self.world.all_reduce_sum_f32(tag, values)
            });
            self.sum("all_reduce_sum_f64", salt, length, |tag, values: &mut [f64]| {
                self.world.all_reduce_sum_f64(tag, values)
            });
            self.sum("all_reduce_sum_bf16", salt, length, |tag, values: &mut [bf16]| {
                self.world.all_reduce_sum_bf16(tag, values)
            });
            let mut mine = values::<f64>(salt, self.rank, length);
            self.world.all_reduce_max_f64(self.tag(), &mut mine).unwrap();
            self.check_values("all_reduce_max_f64", &mine, |i| {
                (0..self.ranks)
                    .map(|rank| f64::from_noise(super::noise(salt, rank, i)))
                    .fold(f64::NEG_INFINITY, f64::max)
            });
        }
    }

    fn sum<T: Number>(&self, what: &str, salt: usize, length: usize, call: impl Fn(Tag, &mut [T]) -> Result<()>) {
        let mut mine = values::<T>(salt, self.rank, length);
        call(self.tag(), &mut mine).unwrap();
        self.check_values(what, &mine, |i| sum_of::<T>(salt, self.ranks, i));
    }

    pub(super) fn scattered_reductions(&self) {
        for (salt, length) in LENGTHS.into_iter().enumerate() {
            self.scattered("reduce_scatter_sum_f32", salt, length, |tag, values: &[f32], mine: &mut [f32]| {
                self.world.reduce_scatter_sum_f32(tag, values, mine)
            });
            self.scattered("reduce_scatter_sum_bf16", salt, length, |tag, values: &[bf16], mine: &mut [bf16]| {
                self.world.reduce_scatter_sum_bf16(tag, values, mine)
            });
        }
        let error = self.world.reduce_scatter_sum_f32(self.tag(), &vec![0.0; self.ranks + 1], &mut [0.0]).unwrap_err();
        self.check(matches!(error, crate::Error::WrongLength { .. }), error);
    }

    fn scattered<T: Number>(
        &self,
        what: &str,
        salt: usize,
        length: usize,
        call: impl Fn(Tag, &[T], &mut [T]) -> Result<()>,
    ) {
        let all = values::<T>(salt, self.rank, length * self.ranks);
        let mut mine = vec![T::default(); length];
        call(self.tag(), &all, &mut mine).unwrap();
        let wrong =
            (0..length).find(|&i| mine[i].bits() != sum_of::<T>(salt, self.ranks, self.rank * length + i).bits());
        self.check(wrong.is_none(), format!("{what} of {length}: element {wrong:?} is wrong"));
    }

    /// NaN, infinities and the two zeros come through, wherever they stand.
    pub(super) fn special_values(&self) {
        const SPECIAL: [f64; 8] =
            [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -0.0, 0.0, f64::MIN_POSITIVE, f64::MAX, 1.0];
        for length in [SPECIAL.len() * SPECIAL.len(), 1 << 15] {
            let at =
                |rank: usize, i: usize| SPECIAL[(i / SPECIAL.len().pow(rank as u32 % 2) + rank / 2) % SPECIAL.len()];
            let mut mine: Vec<f64> = (0..length).map(|i| at(self.rank, i)).collect();
            self.world.all_reduce_sum_f64(self.tag(), &mut mine).unwrap();
            self.check_values("special sums in f64", &mine, |i| {
                fold(0, self.ranks, &|rank| at(rank, i), &|left, right| left + right)
            });

            let mut mine: Vec<f32> = (0..length).map(|i| at(self.rank, i) as f32).collect();
            self.world.all_reduce_sum_f32(self.tag(), &mut mine).unwrap();
            self.check_values("special sums in f32", &mine, |i| {
                fold(0, self.ranks, &|rank| at(rank, i) as f32, &|left, right| left + right)
            });

            let mut mine: Vec<bf16> = (0..length).map(|i| bf16::from_f64(at(self.rank, i))).collect();
            self.world.all_reduce_sum_bf16(self.tag(), &mut mine).unwrap();
            self.check_values("special sums in bf16", &mine, |i| {
                let wide = |rank| bf16::from_f64(at(rank, i)).to_f32();
                bf16::from_f32(fold(0, self.ranks, &wide, &|left, right| left + right))
            });

            let mut mine: Vec<f64> = (0..length).map(|i| at(self.rank, i)).collect();
            self.world.all_reduce_max_f64(self.tag(), &mut mine).unwrap();
            let greatest = |i| {
                let column = || (0..self.ranks).map(|rank| at(rank, i));
                if column().any(f64::is_nan) {
                    return f64::NAN;
                }
                let greatest = column().fold(f64::NEG_INFINITY, f64::max);
                let positive_zero = column().any(|value| value.to_bits() == 0);
                if greatest == 0.0 && positive_zero { 0.0 } else { greatest }
            };
            self.check_values("special maxima", &mine, greatest);
        }
    }
}
