//! The adapters of a block at work: what they add to the outputs of its linear maps, and the backward of that.
//!
//! Adapters compute in f32, whatever the format of the map that they belong to.
//!
//! `y += h·Bᵀ` with `h = s·drop(x)·Aᵀ`, `[T, r]`. With `u = s·dy·B`: `dB += dyᵀ·h`, `dA += uᵀ·drop(x)`, `dx += drop(u·A)`.
//!
//! In several pieces, what all of them share sees the sum over the pieces, in the tree of [`super::super::pieces`], so every
//! rank computes the same bits of it: of a map cut along its outputs, `u` is added up before it meets `A`; of a map cut along
//! its inputs, `h` before it meets `B`.

use candle_core::{DType, Tensor};
use half::bf16;
use tandem_kernels::dropout::dropout_columns;
use tandem_kernels::gemm;
use tandem_kernels::reduce::add_slice;
use tandem_kernels::slice::{to_f32, with_slice, with_slice_mut, with_slice_mut_of};

use super::Adapters;
use crate::Result;
use crate::model::pass::Pass;
use crate::model::pieces;
use crate::model::spec::ModelSpec;
use crate::model::unit::{AdapterSite, OUTPUT, Piece, UnitBuffer};

/// `s·drop(x)·Aᵀ`, `[T, r]`, of each adapter of one linear map.
pub(crate) type Low = Vec<Tensor>;

/// What a block's adapters give one map's backward to add up over pieces: for each adapter, `dy·B` of each piece.
pub(crate) type Rising = Vec<Vec<Tensor>>;

/// The adapters of one block, if it has any.
#[derive(Clone, Copy)]
pub(crate) struct Adapted<'a> {
    pub(crate) spec: &'a ModelSpec,
    /// The block.
    pub(crate) index: usize,
    /// What they are, and their weights.
    pub(crate) adapters: Option<(&'a Adapters, &'a UnitBuffer)>,
}

impl<'a> Adapted<'a> {
    /// The adapters of the parameter `weight`, with their weights and their scale.
    fn of(&self, weight: &'static str) -> impl Iterator<Item = (&'static AdapterSite, &'a UnitBuffer, f64)> + use<'a> {
        let found = self.adapters.into_iter();
        found.flat_map(move |(adapters, unit)| {
            adapters.set.of(weight).map(move |site| (site, unit, adapters.config.scale()))
        })
    }

    fn piece(&self, unit: &UnitBuffer, piece: usize) -> Piece {
        unit.layout().cut.piece(self.spec, piece)
    }

    /// What an adapter reads of the columns `first…` of its map's input, in f32, and, the mask being linear and addressed, what
    /// the backward passes on.
    fn dropout(&self, site: &AdapterSite, first: usize, x: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        /// Sites of the blocks' own dropout lie below.
        const SITES: u16 = 1 << 15;
        let x = &to_f32(x)?;
        match &pass.dropout {
            None => Ok(x.clone()),
            Some(drop) => {
                let number = SITES | (self.index as u16) << 3 | site.number;
                let (p, stream) = (drop.of_adapters, &drop.stream);
                Ok(dropout_columns(x, first, p, stream, number, &drop.addresses)?)
            }
        }
    }

    /// First column of the input of a map cut along its inputs that `piece` reads.
    fn first_input(&self, site: &AdapterSite, unit: &UnitBuffer, piece: usize) -> usize {
        let piece = self.piece(unit, piece);
        if site.weight == OUTPUT { piece.heads.start * self.spec.head_dim } else { piece.mlp.start }
    }

    /// Of a map cut along its outputs: what its adapters make of its input, once for all pieces.
    pub(crate) fn read(&self, weight: &'static str, x: &Tensor, pass: &Pass<'_>) -> Result<Low> {
        let low = |(site, unit, scale): (&'static AdapterSite, &UnitBuffer, f64)| {
            let x = self.dropout(site, 0, x, pass)?;
            Ok((gemm::linear(&x, &unit.get(site.a)?, None)? * scale)?)
        };
        self.of(weight).map(low).collect()
    }

    /// Of a map cut along its outputs: adds to what `piece` has of its output.
    pub(crate) fn write(&self, weight: &'static str, piece: usize, low: &Low, y: &Tensor) -> Result<()> {
        for ((site, unit, _), h) in self.of(weight).zip(low) {
            let rows = site.rows(self.spec, &self.piece(unit, piece));
            add_columns(y, rows.start, &gemm::linear(h, &unit.get_of(piece, site.b)?, None)?)?;
        }
        Ok(())
    }

    /// Backward of [`Self::write`]: adds to the gradient of `B`; puts aside what [`Self::read_backward`] needs in `rising`.
    pub(crate) fn write_backward(
        &self,
        weight: &'static str,
        piece: usize,
        low: &Low,
        dy: &Tensor,
        grads: &UnitBuffer,
        rising: &mut Rising,
    ) -> Result<()> {
        for (place, ((site, unit, _), h)) in self.of(weight).zip(low).enumerate() {
            let rows = site.rows(self.spec, &self.piece(unit, piece));
            let dy = to_f32(&dy.narrow(1, rows.start, rows.len())?.contiguous()?)?;
            gemm::linear_weight_grad(&dy, h, &grads.get_of(piece, site.b)?)?;
            if rising.len() <= place {
                rising.push(Vec::new());
            }
            rising[place].push(gemm::linear_input_grad(&dy, &unit.get_of(piece, site.b)?)?);
        }
        Ok(())
    }

    /// Backward of [`Self::read`]: adds to the gradient of `A`, and to `dx`, that of the map's input.
    pub(crate) fn read_backward(
        &self,
        weight: &'static str,
        rising: Rising,
        x: &Tensor,
        dx: &Tensor,
        pass: &Pass<'_>,
        grads: &UnitBuffer,
    ) -> Result<()> {
        for ((site, unit, scale), parts) in self.of(weight).zip(rising) {
            let u = (pieces::sum(parts, pass.tensor, "gradient of an adapter")? * scale)?;
            let x = self.dropout(site, 0, x, pass)?;
            gemm::linear_weight_grad(&u, &x, &grads.get(site.a)?)?;
            let through = gemm::linear_input_grad(&u, &unit.get(site.a)?)?;
            add_columns(dx, 0, &self.dropout(site, 0, &through, pass)?)?;
        }
        Ok(())
    }

    /// Of a map cut along its inputs: what its adapters make of the input `xs`, one for each piece held.
    pub(crate) fn gather(&self, weight: &'static str, xs: &[(usize, &Tensor)], pass: &Pass<'_>) -> Result<Low> {
        let low = |(site, unit, scale): (&'static AdapterSite, &UnitBuffer, f64)| {
            let of_piece = |&(piece, x): &(usize, &Tensor)| {
                let x = self.dropout(site, self.first_input(site, unit, piece), x, pass)?;
                Ok(gemm::linear(&x, &unit.get_of(piece, site.a)?, None)?)
            };
            let parts = xs.iter().map(of_piece).collect::<Result<_>>()?;
            Ok((pieces::sum(parts, pass.tensor, "rows of an adapter")? * scale)?)
        };
        self.of(weight).map(low).collect()
    }

    /// Of a map cut along its inputs: adds to its output, the sum over all pieces.
    pub(crate) fn spread(&self, weight: &'static str, low: &Low, y: &Tensor) -> Result<()> {
        for ((site, unit, _), h) in self.of(weight).zip(low) {
            add_columns(y, 0, &gemm::linear(h, &unit.get(site.b)?, None)?)?;
        }
        Ok(())
    }

    /// Backward of [`Self::spread`]: adds to the gradient of `B`, returns `u` of each adapter for [`Self::gather_backward`].
    pub(crate) fn spread_backward(
        &self,
        weight: &'static str,
        low: &Low,
        dy: &Tensor,
        grads: &UnitBuffer,
    ) -> Result<Low> {
        if self.adapters.is_none() {
            return Ok(Low::new());
        }
        let dy = &to_f32(dy)?;
        let through = |((site, unit, scale), h): ((&'static AdapterSite, &UnitBuffer, f64), &Tensor)| {
            gemm::linear_weight_grad(dy, h, &grads.get(site.b)?)?;
            Ok((gemm::linear_input_grad(dy, &unit.get(site.b)?)? * scale)?)
        };
        self.of(weight).zip(low).map(through).collect()
    }

    /// Backward of [`Self::gather`] in one piece: adds to the gradient of `A` and to `dx`, that of the piece's input `x`.
    pub(crate) fn gather_backward(
        &self,
        weight: &'static str,
        piece: usize,
        us: &Low,
        x: &Tensor,
        dx: &Tensor,
        pass: &Pass<'_>,
        grads: &UnitBuffer,
    ) -> Result<()> {
        for ((site, unit, _), u) in self.of(weight).zip(us) {
            let first = self.first_input(site, unit, piece);
            gemm::linear_weight_grad(u, &self.dropout(site, first, x, pass)?, &grads.get_of(piece, site.a)?)?;
            let through = gemm::linear_input_grad(u, &unit.get_of(piece, site.a)?)?;
            add_columns(dx, 0, &self.dropout(site, first, &through, pass)?)?;
        }
        Ok(())
    }
}

/// `y[:, first..first + n] += terms [T, n]`, in place; `terms` are f32.
fn add_columns(y: &Tensor, first: usize, terms: &Tensor) -> Result<()> {
    let (width, n) = (y.dims()[1], terms.dims()[1]);
    if n == 0 || width == 0 {
        return Ok(());
    }
    if y.dtype() == DType::BF16 {
        // Rounded once more than a map and its adapters in f32 would be; see the bound of the tests.
        return with_slice(terms, |terms| {
            with_slice_mut_of(y, |y: &mut [bf16]| {
                let rows = y.chunks_exact_mut(width).zip(terms.chunks_exact(n));
                rows.for_each(|(y, terms)| {
                    y[first..first + n]
                        .iter_mut()
                        .zip(terms)
                        .for_each(|(y, term)| *y = bf16::from_f32(y.to_f32() + term));
                });
            })
        })?
        .map_err(Into::into);
    }
    with_slice(terms, |terms| {
        with_slice_mut(y, |y| {
            if n == width {
                return add_slice(y, terms);
            }
            let mut rows = y.chunks_exact_mut(width).zip(terms.chunks_exact(n));
            rows.try_for_each(|(y, terms)| add_slice(&mut y[first..first + n], terms))
        })
    })???;
    Ok(())
}
