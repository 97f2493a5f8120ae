//! The two ends of a model: tokens to hidden rows, and hidden rows to log-probabilities or a score.

use candle_core::Tensor;
use tandem_kernels::embedding::{add_rows, embedding, embedding_backward, embedding_shard, embedding_shard_backward};
use tandem_kernels::logprob::{self, HeadOut};
use tandem_kernels::norm::NormStats;
use tandem_kernels::{dropout, gemm};

use super::exchange;
use super::linear::{norm, norm_backward, rounded};
use super::pass::Pass;
use super::pieces;
use super::spec::{ModelSpec, PositionKind};
use super::unit::{
    EMBEDDING, FINAL_NORM, FINAL_NORM_BIAS, HEAD, POSITIONS, PROJECT_IN, PROJECT_OUT, SCORE, UnitBuffer,
};
use crate::parallel::Group;
use crate::{Error, Result};

/// The unit that holds embedding, final norm and head.
pub(super) struct Ends<'a> {
    pub(super) spec: &'a ModelSpec,
    pub(super) weights: &'a UnitBuffer,
    /// The scalar head that is trained along with adapters.
    pub(super) adapters: Option<&'a UnitBuffer>,
    /// The ranks that share the vocabulary.
    pub(super) tensor: &'a Group,
}

/// What the backward of the embedding needs of its forward.
pub(super) struct EmbedSaved {
    /// Embedded rows before the projection, where there is one.
    embedded: Option<Tensor>,
}

/// Selected hidden rows on their way into the head.
pub(super) struct HeadRows {
    /// Rows as they enter the head, `[N, e]`.
    pub(super) h: Tensor,
    /// Which rows they were; `None`: all.
    rows: Option<Vec<u32>>,
    /// Input and statistics of the final norm.
    norm: Option<(Tensor, NormStats)>,
    /// Input of the projection out, where there is one.
    projected: Option<Tensor>,
}

/// Dropout after the embedding; the blocks count from 1.
const EMBEDDING_SITE: u16 = 0;

impl Ends<'_> {
    /// Hidden rows `[T, d]` of the tokens `ids`.
    pub(super) fn embed(&self, ids: &[u32], pass: &Pass<'_>) -> Result<(Tensor, EmbedSaved)> {
        let embedded = self.lookup(ids)?;
        let (x, saved) = match self.weights.find(PROJECT_IN)? {
            Some(project) => {
                let embedded = rounded(self.weights, &embedded)?;
                (gemm::linear_f32(&embedded, &project, None)?, Some(embedded))
            }
            None => (embedded, None),
        };
        if let PositionKind::Learned { offset } = self.spec.positions {
            add_rows(&x, &self.weights.get(POSITIONS)?, &shifted(pass.positions, offset))?;
        }
        let x = self.dropout(x, pass)?;
        Ok((x, EmbedSaved { embedded: saved }))
    }

    /// Backward of [`Ends::embed`].
    pub(super) fn embed_backward(
        &self,
        saved: &EmbedSaved,
        ids: &[u32],
        dx: Tensor,
        pass: &Pass<'_>,
        grads: &UnitBuffer,
    ) -> Result<()> {
        let dx = self.dropout(dx, pass)?;
        if let PositionKind::Learned { offset } = self.spec.positions {
            embedding_backward(&dx, &shifted(pass.positions, offset), &grads.get(POSITIONS)?)?;
        }
        let d_embedded = match &saved.embedded {
            Some(embedded) => {
                let dx = rounded(self.weights, &dx)?;
                gemm::linear_weight_grad(&dx, embedded, &grads.get(PROJECT_IN)?)?;
                gemm::linear_input_grad_f32(&dx, &self.weights.get(PROJECT_IN)?)?
            }
            None => dx,
        };
        for (piece, first) in self.vocabulary() {
            embedding_shard_backward(&d_embedded, ids, first, &grads.get_of(piece, EMBEDDING)?)?;
        }
        Ok(())
    }

    /// The pieces held here that have entries of the vocabulary, and the first entry of each.
    fn vocabulary(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        let cut = &self.weights.layout().cut;
        let ranges = cut.held.clone().map(|piece| (piece, cut.piece(self.spec, piece).vocabulary));
        ranges.filter(|(_, range)| !range.is_empty()).map(|(piece, range)| (piece, range.start))
    }

    /// Rows of the embedding: each comes from the one piece that has its entry, and is zero in all others.
    fn lookup(&self, ids: &[u32]) -> Result<Tensor> {
        if self.weights.layout().cut.pieces == 1 {
            return Ok(embedding(&self.weights.get(EMBEDDING)?, ids)?);
        }
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= self.spec.vocab_size) {
            let (index, limit) = (id as usize, self.spec.vocab_size);
            return Err(Error::Kernel(tandem_kernels::Error::Index {
                op: "embedding",
                what: "token id",
                index,
                limit,
            }));
        }
        let rows = self
            .vocabulary()
            .map(|(piece, first)| Ok(embedding_shard(&self.weights.get_of(piece, EMBEDDING)?, first, ids)?));
        let mut rows = rows.collect::<Result<Vec<_>>>()?;
        if rows.is_empty() {
            let width = self.spec.embedding_width();
            rows.push(Tensor::zeros((ids.len(), width), candle_core::DType::F32, &candle_core::Device::Cpu)?);
        }
        pieces::sum(rows, self.tensor, "rows of the embedding")
    }

    fn dropout(&self, x: Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        match &pass.dropout {
            None => Ok(x),
            Some(drop) => Ok(dropout::dropout(&x, drop.probability, &drop.stream, EMBEDDING_SITE, &drop.addresses)?),
        }
    }

    /// The rows `rows` of `x [T, d]`, or all of them, normed and projected as the head wants them: `[N, e]`.
    pub(super) fn head_rows(&self, x: &Tensor, rows: Option<&[u32]>) -> Result<HeadRows> {
        let selected = rows.map_or_else(|| Ok(x.clone()), |rows| embedding(x, rows))?;
        let (h, norm) = if self.spec.final_norm() {
            let (h, stats) = norm(self.spec, self.weights, FINAL_NORM, FINAL_NORM_BIAS, &selected)?;
            (h, Some((selected, stats)))
        } else {
            (rounded(self.weights, &selected)?, None)
        };
        let (h, projected) = match self.weights.find(PROJECT_OUT)? {
            Some(project) => (gemm::linear(&h, &project, None)?, Some(h)),
            None => (h, None),
        };
        Ok(HeadRows { h, rows: rows.map(<[u32]>::to_vec), norm, projected })
    }

    /// Backward of [`Ends::head_rows`], adding to `grads` if they are trained: the gradient of `x`, which has `tokens` rows if some
    /// were selected, and is zero in the others.
    pub(super) fn head_rows_backward(
        &self,
        saved: &HeadRows,
        dh: Tensor,
        tokens: usize,
        grads: Option<&UnitBuffer>,
    ) -> Result<Tensor> {
        let dh = match &saved.projected {
            Some(input) => {
                let dh = rounded(self.weights, &dh)?;
                if let Some(grads) = grads {
                    gemm::linear_weight_grad(&dh, input, &grads.get(PROJECT_OUT)?)?;
                }
                gemm::linear_input_grad_f32(&dh, &self.weights.get(PROJECT_OUT)?)?
            }
            None => dh,
        };
        let d_selected = match &saved.norm {
            Some((input, stats)) => {
                norm_backward(self.spec, self.weights, grads, FINAL_NORM, FINAL_NORM_BIAS, input, stats, &dh, None)?
            }
            None => dh,
        };
        let Some(rows) = &saved.rows else { return Ok(d_selected) };
        let dx = Tensor::zeros((tokens, self.spec.hidden), candle_core::DType::F32, d_selected.device())?;
        embedding_backward(&d_selected, rows, &dx)?;
        Ok(dx)
    }

    /// Name of the parameter that is the language head.
    fn head_name(&self) -> &'static str {
        if self.spec.tied { EMBEDDING } else { HEAD }
    }

    /// Log-probability of `labels` and entropy, `[N]` each.
    pub(super) fn log_probs(&self, h: &Tensor, labels: &[u32]) -> Result<HeadOut> {
        if self.weights.layout().cut.pieces == 1 {
            return Ok(logprob::head_logprob(h, &self.weights.get(self.head_name())?, None, labels, 1.0)?);
        }
        let mut mine = Vec::new();
        for (piece, first) in self.vocabulary() {
            let w = self.weights.get_of(piece, self.head_name())?;
            mine.push(logprob::head_partials(h, &w, None, first, labels, 1.0)?);
        }
        Ok(logprob::head_finish(&exchange::partials(&mine, labels.len(), self.tensor)?, 1.0)?)
    }

    /// Backward of [`Ends::log_probs`], adding to `grads` if the head is trained: the gradient of `h`.
    pub(super) fn log_probs_backward(
        &self,
        h: &Tensor,
        labels: &[u32],
        out: &HeadOut,
        dlogp: &Tensor,
        dentropy: Option<&Tensor>,
        grads: Option<&UnitBuffer>,
    ) -> Result<Tensor> {
        let name = self.head_name();
        if let (1, Some(grads)) = (self.weights.layout().cut.pieces, grads) {
            let (w, dw) = (self.weights.get(name)?, grads.get(name)?);
            return Ok(logprob::head_logprob_backward(dlogp, dentropy, h, &w, None, labels, out, &dw, None)?);
        }
        let mut inputs = Vec::new();
        for (piece, first) in self.vocabulary() {
            let w = self.weights.get_of(piece, name)?;
            inputs.push(match grads.map(|grads| grads.get_of(piece, name)).transpose()? {
                Some(dw) => logprob::head_shard_backward(dlogp, dentropy, h, &w, None, first, labels, out, &dw, None)?,
                None => logprob::head_shard_input_grad(dlogp, dentropy, h, &w, None, first, labels, out)?,
            });
        }
        if inputs.is_empty() {
            inputs.push(Tensor::zeros(h.dims(), candle_core::DType::F32, h.device())?);
        }
        pieces::sum(inputs, self.tensor, "gradient of the head's input")
    }

    /// [`Ends::log_probs`] and its backward for a loss with the gradient `dlogp`, whatever its value: the gradient of `h` too.
    pub(super) fn log_probs_with_backward(
        &self,
        h: &Tensor,
        labels: &[u32],
        dlogp: &Tensor,
        grads: Option<&UnitBuffer>,
    ) -> Result<(HeadOut, Tensor)> {
        if let (1, Some(grads)) = (self.weights.layout().cut.pieces, grads) {
            let (w, dw) = (self.weights.get(self.head_name())?, grads.get(self.head_name())?);
            return Ok(logprob::head_logprob_with_backward(dlogp, h, &w, labels, 1.0, &dw)?);
        }
        let out = self.log_probs(h, labels)?;
        let dh = self.log_probs_backward(h, labels, &out, dlogp, None, grads)?;
        Ok((out, dh))
    }

    /// Logits of few rows, `[N, V]` of the entries of each piece held here, and the first entry of each.
    pub(super) fn logits(&self, h: &Tensor) -> Result<Vec<(usize, Tensor)>> {
        let of_piece = |(piece, first)| {
            let logits = match self.weights.packed_of(piece, self.head_name()) {
                Some(packed) => logprob::logits_packed(h, packed, None)?,
                None => logprob::logits(h, &self.weights.get_of(piece, self.head_name())?, None)?,
            };
            Ok((first, logits))
        };
        self.vocabulary().map(of_piece).collect()
    }

    /// Logits of all entries, `[N, V]`.
    pub(super) fn all_logits(&self, h: &Tensor) -> Result<Tensor> {
        let mine: Vec<Tensor> = self.logits(h)?.into_iter().map(|(_, logits)| logits).collect();
        exchange::columns(&mine, h.dims()[0], self.tensor)
    }

    /// Scores `[N]` of a scalar head.
    pub(super) fn scores(&self, h: &Tensor) -> Result<Tensor> {
        Ok(gemm::linear_f32(h, &self.score()?, None)?.flatten_all()?)
    }

    /// The scalar head, `[1, e]`, in the format of the weights; trained along with adapters, it is among them.
    fn score(&self) -> Result<Tensor> {
        rounded(self.weights, &self.adapters.unwrap_or(self.weights).get(SCORE)?)
    }

    /// Backward of [`Ends::scores`]: the gradient of `h`.
    pub(super) fn scores_backward(&self, h: &Tensor, dscores: &Tensor, grads: &UnitBuffer) -> Result<Tensor> {
        let dy = rounded(self.weights, &dscores.reshape((h.dims()[0], 1))?.contiguous()?)?;
        gemm::linear_weight_grad(&dy, h, &grads.get(SCORE)?)?;
        Ok(gemm::linear_input_grad_f32(&dy, &self.score()?)?)
    }
}

fn shifted(positions: &[u32], offset: usize) -> Vec<u32> {
    positions.iter().map(|position| position + offset as u32).collect()
}

/// Checks that a batch selects rows that exist and as many labels as rows.
pub(super) fn check_targets(tokens: usize, rows: &[u32], labels: Option<&[u32]>) -> Result<()> {
    if let Some(&row) = rows.iter().find(|&&row| row as usize >= tokens) {
        return Err(Error::Kernel(tandem_kernels::Error::Index {
            op: "head rows",
            what: "row",
            index: row as usize,
            limit: tokens,
        }));
    }
    match labels {
        Some(labels) if labels.len() != rows.len() => Err(Error::Kernel(tandem_kernels::Error::Shape {
            op: "head rows",
            what: "labels",
            expected: rows.len().to_string(),
            got: labels.len().to_string(),
        })),
        _ => Ok(()),
    }
}
