//! Numbers as bytes for messages between ranks. Both ends are little-endian.

/// Appends the bytes of `values`.
pub(crate) fn append(values: &[f32], bytes: &mut Vec<u8>) {
    let start = bytes.len();
    bytes.resize(start + 4 * values.len(), 0);
    for (four, value) in bytes[start..].as_chunks_mut::<4>().0.iter_mut().zip(values) {
        *four = value.to_le_bytes();
    }
}

/// Fills `values` from as many bytes.
pub(crate) fn fill(values: &mut [f32], bytes: &[u8]) {
    for (value, four) in values.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *value = f32::from_le_bytes(*four);
    }
}
