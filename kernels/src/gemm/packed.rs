//! A weight packed once for many products: what decoding needs, where every step reads all weights for a few rows.

use candle_core::{DType, Tensor};

use super::bf16::PackedOperand;
use super::block::{Right, pack_blocks};
use super::micro::{MicroKernel, micro_kernel};
use super::{Factor, Operand, Stored, bias_of, dims2, product, product_full};
use crate::Result;
use crate::error::check_dims;
use crate::profile::{Class, time};
use crate::room::Room;
use crate::view::{tensor, view, view_of};

/// A weight `[n, k]` in the order in which the kernels read it.
pub struct PackedMatrix {
    n: usize,
    k: usize,
    panels: Panels,
}

enum Panels {
    /// As [`pack_blocks`] writes it for this kernel.
    F32(Room, MicroKernel),
    Bf16(PackedOperand),
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
                pack_blocks(&w, (1, k), n, k, &kernel, panels.first(n.next_multiple_of(kernel.columns) * k));
                Panels::F32(panels, kernel)
            }
        };
        Ok(Self { n, k, panels })
    }

    /// Outputs and inputs of the layer, `[n, k]`.
    pub fn dims(&self) -> [usize; 2] {
        [self.n, self.k]
    }

    /// The element type of the weight.
    pub fn dtype(&self) -> DType {
        match self.panels {
            Panels::F32(..) => DType::F32,
            Panels::Bf16(_) => DType::BF16,
        }
    }

    /// Memory that the copy takes, in bytes: `n` and `k` filled up to whole panels.
    pub fn size_bytes(&self) -> usize {
        match &self.panels {
            Panels::F32(panels, _) => std::mem::size_of_val::<[f32]>(panels),
            Panels::Bf16(panels) => panels.size_bytes(),
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
    let _timer = time(Class::Decode, 2 * rows * n * k);
    match &w.panels {
        Panels::Bf16(panels) => {
            let x = view_of::<half::bf16>(op, x)?;
            let bias = bias.map(|bias| bias_of(op, bias, n, DType::BF16)).transpose()?;
            let a = Operand::along_k(&x, k);
            tensor(product::<E>(rows, n, k, a, Factor::Packed(panels), bias.as_deref()), (rows, n))
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
