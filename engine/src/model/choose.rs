//! Choosing the next tokens where the vocabulary lies in pieces, perhaps on several ranks.
//!
//! Ranks exchange sums and candidates, not logits: what the draw of [`tandem_kernels::sample::ShardDraw`] needs. Every rank
//! draws with the same number and ends with the same token.

use candle_core::Tensor;
use rayon::prelude::*;
use tandem_kernels::sample::{
    Candidate, Exchange, SampleRequest, Sampled, ShardDraw, ShardSummary, choose_block, choose_candidate, finish,
    sample_row_gathered, sample_rows,
};

use super::Model;
use crate::Result;
use crate::parallel::Group;

impl Model {
    /// Draws a token for each row of `logits`, which are those of the pieces held here with their first entries.
    pub(crate) fn choose(&self, logits: &[(usize, Tensor)], requests: &[SampleRequest<'_>]) -> Result<Vec<Sampled>> {
        if let ([(_, all)], 1) = (logits, self.cut.pieces) {
            return Ok(sample_rows(all, requests)?);
        }
        let rows: Vec<Vec<Vec<f32>>> = logits.iter().map(|(_, piece)| Ok(piece.to_vec2()?)).collect::<Result<_>>()?;
        let draws: Vec<Vec<ShardDraw<'_>>> = requests
            .par_iter()
            .enumerate()
            .map(|(row, request)| open(&rows, logits, self.spec.vocab_size, row, request))
            .collect::<Result<_>>()?;
        let summaries = summaries(&draws, &self.tensor)?;
        let parts = parts(&draws, &summaries, requests, &self.tensor)?;
        let mut chosen = Vec::with_capacity(requests.len());
        for ((request, row), part) in requests.iter().zip(&summaries).zip(&parts) {
            chosen.push(match request.params.exchange() {
                Exchange::Nothing => Chosen::Done(finish(row, row.best, 0.0, request.params)),
                Exchange::BlockSums => Chosen::Block(choose_block(part, request.uniform)?),
                Exchange::Candidates => {
                    let candidates: Vec<Candidate> =
                        part.as_chunks::<3>().0.iter().copied().map(Candidate::from_array).collect();
                    let vocabulary = self.spec.vocab_size;
                    let (token, total) =
                        choose_candidate(&candidates, vocabulary, row, request.params, request.uniform)?;
                    Chosen::Done(finish(row, token, total, request.params))
                }
                Exchange::Row => {
                    let logits: Vec<f32> = part.iter().map(|&logit| logit as f32).collect();
                    let (history, params) = (request.history, request.params);
                    Chosen::Done(sample_row_gathered(&logits, row, history, params, request.uniform)?)
                }
            });
        }
        finish_blocks(&draws, &summaries, &chosen, requests, &self.tensor)
    }
}

/// Opens the draw of one row over the pieces held here.
fn open<'a>(
    rows: &'a [Vec<Vec<f32>>],
    logits: &[(usize, Tensor)],
    vocabulary: usize,
    row: usize,
    request: &SampleRequest<'a>,
) -> Result<Vec<ShardDraw<'a>>> {
    let pieces = rows.iter().zip(logits);
    let draw = |(rows, (first, _)): (&'a Vec<Vec<f32>>, &(usize, Tensor))| {
        Ok(ShardDraw::new(&rows[row], *first, vocabulary, request.history, request.params)?)
    };
    pieces.map(draw).collect()
}

/// How far the draw of one row has come.
enum Chosen {
    Done(Sampled),
    /// The block is known; the rank that holds it knows the token.
    Block(tandem_kernels::sample::ChosenBlock),
}

/// The summary of each row over all pieces.
fn summaries(draws: &[Vec<ShardDraw<'_>>], group: &Group) -> Result<Vec<ShardSummary>> {
    let own: Vec<Vec<f64>> =
        draws.par_iter().map(|pieces| pieces.iter().flat_map(|piece| piece.summary().to_array()).collect()).collect();
    let mut rows = vec![ShardSummary::EMPTY; draws.len()];
    exchange("summaries of the next token", &own, group, |row, part| {
        for summary in part.as_chunks::<8>().0 {
            rows[row] = rows[row].merge(ShardSummary::from_array(*summary));
        }
    })?;
    Ok(rows)
}

/// What each row's way of sampling needs to know of all pieces.
fn parts(
    draws: &[Vec<ShardDraw<'_>>],
    summaries: &[ShardSummary],
    requests: &[SampleRequest<'_>],
    group: &Group,
) -> Result<Vec<Vec<f64>>> {
    let of_piece = |request: &SampleRequest<'_>, row: &ShardSummary, piece: &ShardDraw<'_>| -> Vec<f64> {
        match request.params.exchange() {
            Exchange::Nothing => Vec::new(),
            Exchange::BlockSums => piece.block_sums(row),
            Exchange::Candidates => piece.candidates(row).into_iter().flat_map(Candidate::to_array).collect(),
            Exchange::Row => piece.logits().iter().map(|&logit| f64::from(logit)).collect(),
        }
    };
    let rows = draws.par_iter().zip(summaries).zip(requests);
    let own: Vec<Vec<f64>> = rows
        .map(|((pieces, row), request)| pieces.iter().flat_map(|piece| of_piece(request, row, piece)).collect())
        .collect();
    let mut all = vec![Vec::new(); draws.len()];
    exchange("support of the next token", &own, group, |row, part| all[row].extend_from_slice(part))?;
    Ok(all)
}

/// Completes the rows of which only the block is known.
fn finish_blocks(
    draws: &[Vec<ShardDraw<'_>>],
    summaries: &[ShardSummary],
    chosen: &[Chosen],
    requests: &[SampleRequest<'_>],
    group: &Group,
) -> Result<Vec<Sampled>> {
    let own: Vec<Vec<f64>> = draws
        .iter()
        .zip(summaries)
        .zip(chosen)
        .map(|((pieces, row), chosen)| match chosen {
            Chosen::Done(_) => Vec::new(),
            Chosen::Block(block) => {
                let found = pieces.iter().find_map(|piece| piece.token_in_block(row, block));
                found.map(|token| token.to_array().to_vec()).unwrap_or_default()
            }
        })
        .collect();
    let mut tokens = vec![ShardSummary::EMPTY.best; draws.len()];
    exchange("the next token", &own, group, |row, part| {
        if let [token] = part.as_chunks::<3>().0 {
            tokens[row] = Candidate::from_array(*token);
        }
    })?;
    let rows = chosen.iter().zip(summaries).zip(requests).zip(tokens);
    let complete =
        |(((chosen, row), request), token): (((&Chosen, &ShardSummary), &SampleRequest<'_>), Candidate)| match chosen {
            Chosen::Done(sampled) => *sampled,
            Chosen::Block(block) => finish(row, token, block.total, request.params),
        };
    Ok(rows.map(complete).collect())
}

/// Hands what every rank says of each row to `take`, in the order of the ranks, which is that of their entries.
fn exchange(site: &'static str, own: &[Vec<f64>], group: &Group, mut take: impl FnMut(usize, &[f64])) -> Result<()> {
    if group.is_solo() {
        own.iter().enumerate().for_each(|(row, part)| take(row, part));
        return Ok(());
    }
    let mut message = Vec::new();
    for part in own {
        message.extend((part.len() as u64).to_le_bytes());
        message.extend(part.iter().flat_map(|number| number.to_le_bytes()));
    }
    for message in group.gather(site, &message)? {
        let mut words = message.as_chunks::<8>().0.iter();
        for row in 0..own.len() {
            let count = words.next().map_or(0, |word| u64::from_le_bytes(*word)) as usize;
            let part: Vec<f64> = words.by_ref().take(count).map(|word| f64::from_le_bytes(*word)).collect();
            take(row, &part);
        }
    }
    Ok(())
}
