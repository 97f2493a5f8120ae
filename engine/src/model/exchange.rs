//! What ranks that share a vocabulary tell each other of it.

use candle_core::{Device, Tensor};
use tandem_kernels::logprob::HeadPartial;
use tandem_kernels::slice::with_slice;

use crate::parallel::{Group, bytes};
use crate::{Error, Result};

/// The partial sums of `rows` rows over the whole vocabulary, from those of the pieces held here, in the order of the pieces.
pub(super) fn partials(mine: &[Vec<HeadPartial>], rows: usize, group: &Group) -> Result<Vec<HeadPartial>> {
    let message: Vec<u8> =
        mine.iter().flatten().flat_map(|partial| partial.to_array()).flat_map(f64::to_le_bytes).collect();
    let mut merged = vec![HeadPartial::EMPTY; rows];
    for part in group.gather("sums over the vocabulary", &message)? {
        for piece in part.chunks(rows.max(1) * 32) {
            for (seen, bytes) in merged.iter_mut().zip(piece.as_chunks::<32>().0) {
                let number = |index: usize| f64::from_le_bytes(std::array::from_fn(|byte| bytes[8 * index + byte]));
                *seen = seen.merge(HeadPartial::from_array(std::array::from_fn(number)));
            }
        }
    }
    Ok(merged)
}

/// The columns of all pieces side by side, `[rows, V]`.
pub(super) fn columns(mine: &[Tensor], rows: usize, group: &Group) -> Result<Tensor> {
    if let ([all], true) = (mine, group.is_solo()) {
        return Ok(all.clone());
    }
    let own = if mine.is_empty() { Vec::new() } else { vec![Tensor::cat(mine, 1)?.contiguous()?] };
    let mut message = Vec::new();
    for columns in &own {
        with_slice(columns, |values| bytes::append(values, &mut message))?;
    }
    let mut parts = Vec::new();
    for part in group.gather("columns of the vocabulary", &message)? {
        let mut values = vec![0f32; part.len() / 4];
        bytes::fill(&mut values, &part);
        let width = values.len() / rows.max(1);
        if width > 0 {
            parts.push(Tensor::from_vec(values, (rows, width), &Device::Cpu)?);
        }
    }
    if parts.is_empty() {
        return Err(Error::Mesh("no rank holds an entry of the vocabulary".into()));
    }
    Ok(Tensor::cat(&parts, 1)?.contiguous()?)
}
