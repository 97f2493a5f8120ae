//! What a kernel can refuse.

/// Result of a kernel.
pub type Result<T> = std::result::Result<T, Error>;

/// A kernel was called with tensors it cannot work on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Two tensors, or a tensor and a parameter, do not fit together.
    #[error("{op}: {what} must be {expected}, got {got}")]
    Shape {
        /// Name of the kernel.
        op: &'static str,
        /// Which argument.
        what: &'static str,
        /// The shape or value it must have.
        expected: String,
        /// The shape or value it has.
        got: String,
    },
    /// The element type has no kernel yet.
    #[error("{op}: no kernel for dtype {dtype:?}; tensors are f32 or bf16")]
    Dtype {
        /// Name of the kernel.
        op: &'static str,
        /// The element type of the argument.
        dtype: candle_core::DType,
    },
    /// The device has no kernel yet.
    #[error("{op}: no kernel for device {device}; this build runs on the CPU")]
    Device {
        /// Name of the kernel.
        op: &'static str,
        /// The device of the argument.
        device: String,
    },
    /// An index points outside its table.
    #[error("{op}: {what} {index} is out of range (limit {limit})")]
    Index {
        /// Name of the kernel.
        op: &'static str,
        /// What the index counts.
        what: &'static str,
        /// The index.
        index: usize,
        /// One past the largest valid index.
        limit: usize,
    },
    /// A parameter is outside its range.
    #[error("{op}: {what} must be {expected}, got {got}")]
    Value {
        /// Name of the kernel.
        op: &'static str,
        /// Which parameter.
        what: &'static str,
        /// The range.
        expected: &'static str,
        /// The value it has.
        got: f64,
    },
    /// An input holds an infinity or a NaN where neither can be worked with.
    #[error("{op}: {what} {index} is {value}")]
    NonFinite {
        /// Name of the kernel.
        op: &'static str,
        /// What the index counts.
        what: &'static str,
        /// Where the first such value is.
        index: usize,
        /// The value.
        value: f32,
    },
    /// The tensor library refused.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    /// A [`Error::Shape`] from anything printable.
    pub(crate) fn shape(
        op: &'static str,
        what: &'static str,
        expected: impl std::fmt::Debug,
        got: impl std::fmt::Debug,
    ) -> Self {
        Error::Shape { op, what, expected: format!("{expected:?}"), got: format!("{got:?}") }
    }
}

/// `Ok` if `got == expected`, else a shape error naming the argument.
pub(crate) fn check_dims(op: &'static str, what: &'static str, expected: &[usize], got: &[usize]) -> Result<()> {
    if expected == got { Ok(()) } else { Err(Error::shape(op, what, expected, got)) }
}

/// `Ok` if `tensor` has the dtype that another argument asks for, else an error naming both.
pub(crate) fn check_dtype(
    op: &'static str,
    what: &'static str,
    expected: candle_core::DType,
    tensor: &candle_core::Tensor,
) -> Result<()> {
    if tensor.dtype() == expected { Ok(()) } else { Err(Error::shape(op, what, expected, tensor.dtype())) }
}
