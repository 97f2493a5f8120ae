//! Passes that keep nothing: scoring, reading prompts, decoding.

use candle_core::Tensor;
use tandem_kernels::attention::{KvCacheLayer, append_decode_attention, attention};

use super::ends::{Ends, check_targets};
use super::{LogProbs, Model};
use crate::batch::Packed;
use crate::parallel::pipeline;
use crate::{Error, Result};

impl Model {
    /// Hidden rows after the last block, all or only `rows`, keeping nothing and dropping nothing; `None` on a rank that is not
    /// the last stage of its pipeline, which has passed its rows on.
    fn hidden(&self, batch: &Packed, rows: &[u32]) -> Result<Option<Tensor>> {
        batch.check(self.spec.max_positions)?;
        let pass = self.pass_to(batch, rows, None);
        let mut x = if self.parallel.is_first_stage() {
            let ends = self.unit_of_pass(0, batch.tokens(), self.blocks.clone().map(|block| block + 1))?;
            self.ends(&ends).embed(&batch.ids, &pass)?.0
        } else {
            pipeline::receive_rows(&self.parallel, batch.tokens(), self.spec.hidden, pipeline::Direction::Forward)?
        };
        for index in self.blocks.clone() {
            let unit = self.unit_of_pass(index + 1, batch.tokens(), self.after(index))?;
            let attend = |place: usize, qkv: &Tensor| Ok(attention(qkv, pass.cu_seqlens, &pass.attention[place])?.0);
            x = self.block(index, &unit).infer(&x, &pass, attend)?;
        }
        if self.parallel.is_last_stage() {
            return Ok(Some(x));
        }
        pipeline::send_rows(&self.parallel, &x, pipeline::Direction::Forward)?;
        Ok(None)
    }

    /// Log-probability that row `rows[n]` of the batch gives to the token `labels[n]`.
    ///
    /// This is *the* log-probability: what the sampler records, what the reference policy scores and what training
    /// differentiates agree bit for bit. There is no dropout here.
    ///
    /// # Errors
    /// If the batch does not fit the model or a row or label does not exist.
    pub fn log_probs(&self, batch: &Packed, rows: &[u32], labels: &[u32]) -> Result<LogProbs> {
        check_targets(batch.tokens(), rows, Some(labels))?;
        let out = match self.hidden(batch, rows)? {
            None => None,
            Some(x) => {
                let ends = self.unit_of_pass(0, batch.tokens(), None)?;
                let out = self.ends(&ends).log_probs(&read(&self.ends(&ends), &x, batch, rows)?, labels)?;
                Some([out.logp, out.entropy])
            }
        };
        let [logp, entropy] = pipeline::from_last_stage(&self.parallel, out, rows.len())?;
        Ok(LogProbs { logp, entropy })
    }

    /// Score `[N]` at each of `rows` of the batch; for models with a scalar head.
    ///
    /// # Errors
    /// If the batch does not fit the model, a row does not exist or the head is not scalar.
    pub fn scores(&self, batch: &Packed, rows: &[u32]) -> Result<Tensor> {
        check_targets(batch.tokens(), rows, None)?;
        let out = match self.hidden(batch, rows)? {
            None => None,
            Some(x) => {
                let ends = self.unit_of_pass(0, batch.tokens(), None)?;
                Some([self.ends(&ends).scores(&read(&self.ends(&ends), &x, batch, rows)?)?])
            }
        };
        let [scores] = pipeline::from_last_stage(&self.parallel, out, rows.len())?;
        Ok(scores)
    }

    /// A rank that has no rows to score takes part in bringing sliced weights together, as often as the others score.
    ///
    /// # Errors
    /// If ranks have lost each other.
    pub fn join_scoring(&self) -> Result<()> {
        if self.parallel.is_first_stage() {
            self.unit(0, self.blocks.clone().map(|block| block + 1))?;
        }
        for index in self.blocks.clone() {
            self.unit(index + 1, self.after(index))?;
        }
        if self.parallel.is_last_stage() {
            self.unit(0, None)?;
        }
        Ok(())
    }

    /// Logits of every row, `[T, V]`: for tests and for looking at a model; training never stores them.
    ///
    /// # Errors
    /// If the batch does not fit the model, or it is cut for a pipeline.
    pub fn logits(&self, batch: &Packed) -> Result<Tensor> {
        let whole = || Error::Mesh("logits of all rows are computed on the last stage of a pipeline only".into());
        let rows: Vec<u32> = (0..batch.tokens() as u32).collect();
        let x = self.hidden(batch, &rows)?.ok_or_else(whole)?;
        let ends = self.unit_of_pass(0, batch.tokens(), None)?;
        self.ends(&ends).all_logits(&read(&self.ends(&ends), &x, batch, &rows)?)
    }

    /// Reads prompts into the cache, sequence `b` into slot `slots[b]`; returns the last row of each as it enters the
    /// head, `[B, e]`. The cache has the pieces of each block.
    pub(crate) fn prefill(&self, batch: &Packed, cache: &[Vec<KvCacheLayer>], slots: &[usize]) -> Result<Tensor> {
        batch.check(self.spec.max_positions)?;
        let entries: Vec<(usize, usize)> = slots
            .iter()
            .enumerate()
            .flat_map(|(sequence, &slot)| (0..batch.rows(sequence).len()).map(move |position| (slot, position)))
            .collect();
        let last: Vec<u32> = batch.cu_seqlens[1..].iter().map(|end| end - 1).collect();
        let pass = self.pass_to(batch, &last, None);
        let ends = self.unit(0, None)?;
        let (mut x, _) = self.ends(&ends).embed(&batch.ids, &pass)?;
        for (index, layer) in cache.iter().enumerate() {
            let unit = self.unit_of_pass(index + 1, batch.tokens(), None)?;
            x = self.block(index, &unit).infer(&x, &pass, |place, qkv| {
                layer[place].append(qkv, pass.attention[place].heads, &entries)?;
                Ok(attention(qkv, pass.cu_seqlens, &pass.attention[place])?.0)
            })?;
        }
        read(&self.ends(&ends), &x, batch, &last)
    }

    /// One token per active slot: token `ids[r]` at position `places[r].1` of slot `places[r].0`; returns the rows as
    /// they enter the head, `[R, e]`.
    pub(crate) fn decode(&self, ids: &[u32], places: &[(usize, usize)], cache: &[Vec<KvCacheLayer>]) -> Result<Tensor> {
        let positions: Vec<u32> = places.iter().map(|&(_, position)| position as u32).collect();
        let visible: Vec<(usize, usize)> = places.iter().map(|&(slot, position)| (slot, position + 1)).collect();
        let pass = self.pass(&[], &positions, None);
        let ends = self.unit(0, None)?;
        let (mut x, _) = self.ends(&ends).embed(ids, &pass)?;
        for (index, layer) in cache.iter().enumerate() {
            let unit = self.unit(index + 1, None)?;
            x = self.block(index, &unit).infer(&x, &pass, |place, qkv| {
                Ok(append_decode_attention(qkv, &layer[place], &visible, &pass.attention[place])?)
            })?;
        }
        Ok(self.ends(&ends).head_rows(&x, None)?.h)
    }

    /// Logits of rows that [`Model::prefill`] or [`Model::decode`] returned, of the entries of each piece held here, and the
    /// first entry of each.
    pub(crate) fn head_logits(&self, h: &Tensor) -> Result<Vec<(usize, Tensor)>> {
        let ends = self.unit(0, None)?;
        self.ends(&ends).logits(h)
    }
}

/// The rows `rows` of the batch as they enter the head, `[N, e]`, out of `x`, which has them alone or all.
fn read(ends: &Ends<'_>, x: &Tensor, batch: &Packed, rows: &[u32]) -> Result<Tensor> {
    let has_others = x.dims()[0] == batch.tokens();
    Ok(ends.head_rows(x, has_others.then_some(rows))?.h)
}
