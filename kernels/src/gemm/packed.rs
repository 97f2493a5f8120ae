//! A weight packed once for many products: what decoding needs, where every step reads all weights for a few rows; and the
//! only form of a weight in 8 bits.

use candle_core::{DType, Tensor};

use super::bf16::{self, Int8Operand, PackedOperand};
use super::block::{Right, pack_panels, unpack_panels};
use super::micro::{MicroKernel, micro_kernel};
use super::{Factor, Operand, Product, Start, Stored, bias_of, dims2, filled, multiply, product, product_full};
use crate::error::check_dims;
use crate::profile::{Class, time};
use crate::room::Room;
use crate::view::{tensor, view, view_of};
use crate::{Error, Result};

/// Rows of a weight that lie in one panel, and terms of a step of it.
const PANEL: usize = 32;
/// More rows than these are no step of decoding.
const DECODED_ROWS: usize = 64;

/// A weight `[n, k]` in the order in which the kernels read it.
pub struct PackedMatrix {
    n: usize,
    k: usize,
    panels: Panels,
}

enum Panels {
    /// As [`pack_panels`] writes it for this kernel.
    F32(Room, MicroKernel),
    Bf16(PackedOperand),
    Int8(Int8Operand),
}

/// The largest magnitude in each row of `w`, `[n, k]`, f32: NaN where one is NaN, infinite where one is.
///
/// # Errors
/// As [`PackedMatrix::new`].
pub fn row_maxima(w: &Tensor) -> Result<Vec<f32>> {
    const OP: &str = "row_maxima";
    let (n, k) = dims2(OP, "w", w)?;
    if k == 0 { Ok(vec![0.0; n]) } else { Ok(bf16::row_maxima(&view(OP, w)?, k)) }
}

impl PackedMatrix {
    /// Packs a copy of `w`, `[n, k]`, f32 or bf16.
    ///
    /// # Errors
    /// Another shape or dtype, another device than the CPU, a non-contiguous tensor.
    pub fn new(w: &Tensor) -> Result<Self> {
        const OP: &str = "PackedMatrix::new";
        let (n, k) = dims2(OP, "w", w)?;
        let panels = match w.dtype() {
            DType::BF16 => Panels::Bf16(PackedOperand::new(&view_of::<half::bf16>(OP, w)?, n, k)),
            _ => {
                let (w, kernel) = (view(OP, w)?, micro_kernel());
                let mut panels = Room::default();
                pack_panels(&w, (1, k), n, k, &kernel, panels.first(n.next_multiple_of(kernel.columns) * k));
                Panels::F32(panels, kernel)
            }
        };
        Ok(Self { n, k, panels })
    }

    /// Packs `w`, `[n, k]`, f32, in 8 bits: `w_jk ≈ s_j q_jk` with `s_j = maxima[j] / 127`, rounded up to 17 bits of
    /// significand, and `q_jk` the nearest integer from −127 to 127, ties to even. Each weight is off by at most `s_j / 2`;
    /// weights that have been through 8 bits before are not changed by it.
    ///
    /// `maxima` are those of [`row_maxima`], or of longer rows that these are a part of. It multiplies rows of bf16.
    ///
    /// # Errors
    /// As [`Self::new`], and [`Error::NonFinite`] with the row whose maximum is not a number.
    pub fn int8(w: &Tensor, maxima: &[f32]) -> Result<Self> {
        const OP: &str = "PackedMatrix::int8";
        let (n, k) = dims2(OP, "w", w)?;
        check_dims(OP, "maxima", &[n], &[maxima.len()])?;
        if let Some(index) = maxima.iter().position(|maximum| !maximum.is_finite()) {
            return Err(Error::NonFinite { op: OP, what: "largest magnitude of row", index, value: maxima[index] });
        }
        Ok(Self { n, k, panels: Panels::Int8(Int8Operand::new(&view(OP, w)?, maxima, n, k)) })
    }

    /// Bytes that [`Self::int8`] takes for a weight `[n, k]`.
    pub fn int8_bytes(n: usize, k: usize) -> usize {
        n.next_multiple_of(PANEL) * (k.next_multiple_of(PANEL) + size_of::<f32>())
    }

    /// What is multiplied with, `[n, k]`, f32, of a matrix in 8 bits; `None` of any other, which is its own original.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn dequantised(&self) -> Result<Option<Tensor>> {
        match &self.panels {
            Panels::Int8(panels) => Ok(Some(tensor(panels.dequantised(), (self.n, self.k))?)),
            Panels::F32(..) | Panels::Bf16(_) => Ok(None),
        }
    }

    /// The weight that was packed, to the bit; of one in 8 bits, what is multiplied with, in f32.
    ///
    /// # Errors
    /// If the tensor library refuses.
    pub fn unpacked(&self) -> Result<Tensor> {
        let (n, k) = (self.n, self.k);
        match &self.panels {
            Panels::Bf16(panels) => tensor(panels.unpacked(), (n, k)),
            Panels::F32(panels, kernel) => tensor(unpack_panels(panels, n, k, kernel), (n, k)),
            Panels::Int8(panels) => tensor(panels.dequantised(), (n, k)),
        }
    }

    /// Outputs and inputs of the layer, `[n, k]`.
    pub fn dims(&self) -> [usize; 2] {
        [self.n, self.k]
    }

    /// The element type of the rows that it multiplies.
    pub fn dtype(&self) -> DType {
        match self.panels {
            Panels::F32(..) => DType::F32,
            Panels::Bf16(_) | Panels::Int8(_) => DType::BF16,
        }
    }

    /// Memory that the copy takes, in bytes: `n` and `k` filled up to whole panels, and the scales.
    pub fn size_bytes(&self) -> usize {
        match &self.panels {
            Panels::F32(panels, _) => std::mem::size_of_val::<[f32]>(panels),
            Panels::Bf16(panels) => panels.size_bytes(),
            Panels::Int8(panels) => panels.size_bytes(),
        }
    }
}

/// Bit for bit [`linear`](super::linear) with the weight that was packed, without packing it for the call.
///
/// # Errors
/// As [`linear`](super::linear).
pub fn linear_packed(x: &Tensor, w: &PackedMatrix, bias: Option<&Tensor>) -> Result<Tensor> {
    packed::<half::bf16>("linear_packed", x, w, bias)
}

/// Bit for bit [`linear_f32`](super::linear_f32) with the weight that was packed.
///
/// # Errors
/// As [`linear`](super::linear).
pub fn linear_packed_f32(x: &Tensor, w: &PackedMatrix, bias: Option<&Tensor>) -> Result<Tensor> {
    packed::<f32>("linear_packed_f32", x, w, bias)
}

/// The product in `E` for a bf16 weight; an f32 weight gives f32 always.
pub(crate) fn packed<E: Stored>(
    op: &'static str,
    x: &Tensor,
    w: &PackedMatrix,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let (rows, xk) = dims2(op, "x", x)?;
    let (n, k) = (w.n, w.k);
    check_dims(op, "columns of w", &[xk], &[k])?;
    // Weights in 8 bits are multiplied so by passes of every kind.
    let is_linear = matches!(w.panels, Panels::Int8(_)) && rows > DECODED_ROWS;
    let _timer = time(if is_linear { Class::Linear } else { Class::Decode }, 2 * rows * n * k);
    match &w.panels {
        Panels::Bf16(panels) => {
            let x = view_of::<half::bf16>(op, x)?;
            let bias = bias.map(|bias| bias_of(op, bias, n, DType::BF16)).transpose()?;
            let a = Operand::along_k(&x, k);
            tensor(product::<E>(rows, n, k, a, Factor::Packed(panels), bias.as_deref()), (rows, n))
        }
        Panels::Int8(panels) => {
            let x = view_of::<half::bf16>(op, x)?;
            let bias = bias.map(|bias| bias_of(op, bias, n, DType::BF16)).transpose()?;
            let (a, start) = (Operand::along_k(&x, k), Start::Scaled(panels.scales(), bias.as_deref()));
            // SAFETY: a product that does not start from its output writes each of its elements and reads none.
            let y = unsafe {
                filled::<E>(rows * n, |c| multiply(Product { m: rows, n, k, a, b: Factor::Int8(panels), start, c }))
            };
            tensor(y, (rows, n))
        }
        Panels::F32(panels, kernel) => {
            let xv = view(op, x)?;
            if let Some(bias) = bias {
                check_dims(op, "bias", &[n], bias.dims())?;
            }
            let bias = bias.map(|bias| view(op, bias)).transpose()?;
            let y = product_full(rows, n, k, &xv, Right::Packed(panels, *kernel), bias.as_deref());
            tensor(y, (rows, n))
        }
    }
}

impl std::fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PackedMatrix").field("dims", &self.dims()).field("dtype", &self.dtype()).finish()
    }
}
