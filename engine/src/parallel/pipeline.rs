//! What stages of a pipeline tell each other: rows forward, gradients of rows back, results to all.

use candle_core::{Device, Tensor};
use tandem_kernels::slice::{with_slice, with_slice_mut};

use super::{Parallel, bytes};
use crate::Result;

/// Which way rows go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From a stage to the next one.
    Forward,
    /// From a stage to the one before.
    Backward,
}

impl Direction {
    fn site(self) -> &'static str {
        match self {
            Direction::Forward => "rows to the next stage",
            Direction::Backward => "gradients to the stage before",
        }
    }

    /// The stage that this stage sends to; it receives from the other neighbour.
    fn neighbours(self, stage: usize) -> (usize, usize) {
        match self {
            Direction::Forward => (stage + 1, stage.wrapping_sub(1)),
            Direction::Backward => (stage.wrapping_sub(1), stage + 1),
        }
    }
}

/// Sends rows on. Does not wait for them to be received.
pub(crate) fn send_rows(parallel: &Parallel, rows: &Tensor, way: Direction) -> Result<()> {
    let (to, _) = way.neighbours(parallel.at.pipeline);
    let mut message = Vec::new();
    with_slice(&rows.contiguous()?, |values| bytes::append(values, &mut message))?;
    // The number of tokens tells apart what goes one after the other between two stages.
    let tag = tandem_collective::Tag::new(way.site(), rows.elem_count() as u64);
    Ok(parallel.pipeline.world().send(tag, message, to)?)
}

/// Receives rows `[tokens, width]`.
pub(crate) fn receive_rows(parallel: &Parallel, tokens: usize, width: usize, way: Direction) -> Result<Tensor> {
    let (_, from) = way.neighbours(parallel.at.pipeline);
    let mut message = vec![0u8; 4 * tokens * width];
    let tag = tandem_collective::Tag::new(way.site(), (tokens * width) as u64);
    parallel.pipeline.world().receive(tag, &mut message, from)?;
    let mut values = vec![0f32; tokens * width];
    bytes::fill(&mut values, &message);
    Ok(Tensor::from_vec(values, (tokens, width), &Device::Cpu)?)
}

const ENDS: tandem_collective::Tag = tandem_collective::Tag::new("gradient of the head to the first stage", 0);

/// Sends what the head has added to the gradient of the ends to the first stage.
pub(crate) fn send_ends(parallel: &Parallel, gradient: &Tensor) -> Result<()> {
    let mut message = Vec::new();
    with_slice(gradient, |values| bytes::append(values, &mut message))?;
    Ok(parallel.pipeline.world().send(ENDS, message, 0)?)
}

/// Receives what [`send_ends`] of the last stage has sent, into the gradient of the ends.
pub(crate) fn receive_ends(parallel: &Parallel, gradient: &Tensor) -> Result<()> {
    let mut message = vec![0u8; 4 * gradient.elem_count()];
    parallel.pipeline.world().receive(ENDS, &mut message, parallel.pipeline.size() - 1)?;
    Ok(with_slice_mut(gradient, |values| bytes::fill(values, &message))?)
}

/// Gives all stages what the last one has computed: `K` vectors of `len` numbers.
pub(crate) fn from_last_stage<const K: usize>(
    parallel: &Parallel,
    mine: Option<[Tensor; K]>,
    len: usize,
) -> Result<[Tensor; K]> {
    let group = &parallel.pipeline;
    if let (true, Some(mine)) = (group.is_solo(), &mine) {
        return Ok(mine.clone());
    }
    let mut message = Vec::with_capacity(4 * K * len);
    match &mine {
        Some(tensors) => {
            for tensor in tensors {
                with_slice(tensor, |values| bytes::append(values, &mut message))?;
            }
        }
        None => message.resize(4 * K * len, 0),
    }
    group.world().broadcast(group.tag("results of the last stage"), &mut message, group.size() - 1)?;
    let mut tensors = Vec::with_capacity(K);
    for part in 0..K {
        let mut values = vec![0f32; len];
        bytes::fill(&mut values, &message[4 * part * len..4 * (part + 1) * len]);
        tensors.push(Tensor::from_vec(values, len, &Device::Cpu)?);
    }
    tensors.try_into().map_err(|_| crate::Error::Mesh("a pipeline's results were lost".into()))
}
