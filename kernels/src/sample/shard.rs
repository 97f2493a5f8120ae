//! Choosing a token when the row of logits is cut into shards of the vocabulary, without gathering the row.
//!
//! [`ShardDraw`] describes the steps. Nothing here communicates.

use std::borrow::Cow;

use super::distribution::{self, Pick};
use super::{Sampled, SamplingParams};
use crate::logprob::{BLOCK, HeadPartial, row_partial};
use crate::math;
use crate::{Error, Result};

/// What the owners of a row's shards exchange after their summaries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exchange {
    /// Nothing: the choice is greedy.
    Nothing,
    /// The sums of the weights of all blocks, then the token.
    BlockSums,
    /// The entries that may be drawn.
    Candidates,
    /// The whole row.
    Row,
}

impl SamplingParams {
    /// What the owners of a row's shards exchange after their summaries; the same on every rank.
    pub fn exchange(&self) -> Exchange {
        if self.is_greedy() {
            Exchange::Nothing
        } else if !self.truncates() {
            Exchange::BlockSums
        } else if self.top_k > 0 || self.top_p == 1.0 {
            Exchange::Candidates
        } else {
            Exchange::Row
        }
    }
}

/// A token that may be chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// The entry of the whole vocabulary.
    pub token: u32,
    /// Its logit after the repetition penalty.
    pub score: f32,
    /// Its logit as it came.
    pub logit: f32,
}

impl Candidate {
    /// The three fields as they stand, for an exchange between ranks; [`Candidate::from_array`] reverses it exactly.
    pub fn to_array(self) -> [f64; 3] {
        [f64::from(self.token), f64::from(self.score), f64::from(self.logit)]
    }

    /// The candidate that [`Candidate::to_array`] took apart.
    pub fn from_array([token, score, logit]: [f64; 3]) -> Self {
        Self { token: token as u32, score: score as f32, logit: logit as f32 }
    }
}

/// What a shard says of its entries before anything is drawn; merged over all shards, what the row says.
#[derive(Clone, Copy, Debug)]
pub struct ShardSummary {
    /// The policy's own distribution, at temperature 1 and without a penalty.
    pub partial: HeadPartial,
    /// The largest score; −∞ of no entries.
    pub max: f32,
    /// The first entry of the largest score.
    pub best: Candidate,
}

impl ShardSummary {
    /// Of no entries.
    pub const EMPTY: Self = Self {
        partial: HeadPartial::EMPTY,
        max: f32::NEG_INFINITY,
        best: Candidate { token: u32::MAX, score: f32::NEG_INFINITY, logit: f32::NEG_INFINITY },
    };

    /// Two parts of a row as one, `later` being the one of the higher entries. Merge shards one by one, in order.
    #[must_use]
    pub fn merge(self, later: Self) -> Self {
        Self {
            partial: self.partial.merge(later.partial),
            max: math::larger(self.max, later.max),
            best: if later.best.score > self.best.score { later.best } else { self.best },
        }
    }

    /// The numbers of the summary, for an exchange between ranks; [`ShardSummary::from_array`] reverses it exactly.
    pub fn to_array(self) -> [f64; 8] {
        let ([a, b, c, d], [token, score, logit]) = (self.partial.to_array(), self.best.to_array());
        [a, b, c, d, f64::from(self.max), token, score, logit]
    }

    /// The summary that [`ShardSummary::to_array`] took apart.
    pub fn from_array([a, b, c, d, max, token, score, logit]: [f64; 8]) -> Self {
        let (partial, best) = (HeadPartial::from_array([a, b, c, d]), Candidate::from_array([token, score, logit]));
        Self { partial, max: max as f32, best }
    }
}

/// One shard's part in drawing a token from one row.
///
/// The owners of a row's shards take these steps together, and every rank ends with the same
/// [`Sampled`]; the results depend on the cuts of the vocabulary, not on who holds which shard:
///
/// 1. Each shard opens a [`ShardDraw`]. All [`ShardDraw::summary`] are exchanged and merged in order of entries
///    ([`ShardSummary::merge`]) into the row's summary.
/// 2. [`SamplingParams::exchange`] says what follows, and needs no exchange itself:
///    * [`Exchange::Nothing`] (greedy): the token is the summary's `best`.
///    * [`Exchange::BlockSums`] (the whole vocabulary is the support): all [`ShardDraw::block_sums`] are exchanged;
///      [`choose_block`] on each rank; the shard that holds the block finds the [`ShardDraw::token_in_block`] and
///      broadcasts it.
///    * [`Exchange::Candidates`] (top-k, or min-p alone): all [`ShardDraw::candidates`] are exchanged;
///      [`choose_candidate`] on each rank.
///    * [`Exchange::Row`] (top-p without top-k, whose support no shard can bound): all logits are gathered, and
///      [`sample_row_gathered`] does the rest.
/// 3. [`finish`] makes the [`Sampled`] from the token and the row's summary.
///
/// [`sample_row_sharded`] takes all steps over shards that one rank holds.
#[derive(Clone, Debug)]
pub struct ShardDraw<'a> {
    logits: &'a [f32],
    first_entry: usize,
    scores: Cow<'a, [f32]>,
    params: &'a SamplingParams,
}

impl<'a> ShardDraw<'a> {
    /// Opens the draw over `logits`, those of the entries from `first_entry` on out of `vocabulary`.
    ///
    /// `first_entry` is a multiple of [`BLOCK`] unless the shard is empty; `history`: tokens of the whole vocabulary, for
    /// the repetition penalty.
    ///
    /// # Errors
    /// [`Error::NonFinite`] if a logit is infinite or NaN; [`Error::Index`] if a token of the history or the shard lies
    /// beyond the vocabulary; [`Error::Value`] if a parameter or `first_entry` is not what it must be.
    pub fn new(
        logits: &'a [f32],
        first_entry: usize,
        vocabulary: usize,
        history: &[u32],
        params: &'a SamplingParams,
    ) -> Result<Self> {
        Self::open("sample_shard", logits, first_entry, vocabulary, history, params)
    }

    /// [`ShardDraw::new`] under the name of the operation that a caller asked for.
    fn open(
        op: &'static str,
        logits: &'a [f32],
        first_entry: usize,
        vocabulary: usize,
        history: &[u32],
        params: &'a SamplingParams,
    ) -> Result<Self> {
        params.validate()?;
        let end = first_entry.saturating_add(logits.len());
        if end > vocabulary {
            return Err(Error::Index { op, what: "the last entry of the shard", index: end - 1, limit: vocabulary });
        }
        if !logits.is_empty() && !first_entry.is_multiple_of(BLOCK) {
            let got = first_entry as f64;
            return Err(Error::Value { op, what: "first_entry", expected: "a multiple of 512", got });
        }
        // A branch-free pass first: it vectorises, the search for the culprit does not.
        if !logits.iter().fold(true, |finite, logit| finite & logit.is_finite())
            && let Some(index) = logits.iter().position(|logit| !logit.is_finite())
        {
            let (index, value) = (first_entry + index, logits[index]);
            return Err(Error::NonFinite { op, what: "the logit of token", index, value });
        }
        if let Some(&token) = history.iter().find(|&&token| token as usize >= vocabulary) {
            return Err(Error::Index { op, what: "token of the history", index: token as usize, limit: vocabulary });
        }
        let scores = distribution::penalised(logits, first_entry, history, params.repetition_penalty);
        Ok(Self { logits, first_entry, scores, params })
    }

    /// The logits of this shard as they came.
    pub fn logits(&self) -> &[f32] {
        self.logits
    }

    /// What this shard says of its entries.
    pub fn summary(&self) -> ShardSummary {
        let max = math::max(&self.scores);
        let best = distribution::position(&self.scores, max).map_or(ShardSummary::EMPTY.best, |at| self.candidate(at));
        ShardSummary { partial: row_partial(self.logits), max, best }
    }

    /// Sums of the weights `exp((score − max) / temperature)`, one for each [`BLOCK`] entries of this shard.
    ///
    /// `row`: the summaries of all shards, merged.
    pub fn block_sums(&self, row: &ShardSummary) -> Vec<f64> {
        distribution::block_sums(&self.scores, row.max, self.params.temperature)
    }

    /// The token that `chosen` falls on, if this shard holds its block.
    pub fn token_in_block(&self, row: &ShardSummary, chosen: &ChosenBlock) -> Option<Candidate> {
        let start = (chosen.block * BLOCK).checked_sub(self.first_entry).filter(|&start| start < self.scores.len())?;
        let scores = &self.scores[start..self.scores.len().min(start + BLOCK)];
        let weights = distribution::weights(scores, row.max, self.params.temperature);
        let weights: Vec<f64> = weights.into_iter().map(f64::from).collect();
        Some(self.candidate(start + distribution::pick(&weights, chosen.rest).index))
    }

    /// The entries of this shard that may be drawn, in order: the `top_k` highest or, without top-k, those that min-p
    /// keeps. All those of no lower rank in other shards decide with [`choose_candidate`].
    pub fn candidates(&self, row: &ShardSummary) -> Vec<Candidate> {
        let kept = distribution::candidates(&self.scores, row.max, self.params);
        kept.into_iter().map(|at| self.candidate(at)).collect()
    }

    fn candidate(&self, at: usize) -> Candidate {
        Candidate { token: (self.first_entry + at) as u32, score: self.scores[at], logit: self.logits[at] }
    }
}

/// The block of the vocabulary that a uniform number falls on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ChosenBlock {
    /// Which block of [`BLOCK`] entries, counted over the whole vocabulary.
    pub block: usize,
    /// Where in the block, in `[0, 1)`: again uniform.
    pub rest: f64,
    /// The sum of all weights of the row, for [`finish`].
    pub total: f64,
}

/// The block that `uniform`, in `[0, 1)`, falls on, given the sums of all blocks of all shards, in order of entries.
///
/// # Errors
/// [`Error::Value`] if `uniform` is outside its range, [`Error::Shape`] if there is no block.
pub fn choose_block(block_sums: &[f64], uniform: f64) -> Result<ChosenBlock> {
    const OP: &str = "choose_block";
    check_draw(OP, "block_sums", block_sums.len(), uniform)?;
    let Pick { index, rest } = distribution::pick(block_sums, uniform);
    Ok(ChosenBlock { block: index, rest, total: block_sums.iter().sum() })
}

/// The candidate that `uniform`, in `[0, 1)`, falls on, and the sum of the weights of all that could have been drawn.
///
/// `candidates`: those of all shards, in order of entries; `vocabulary`: the entries of the whole row.
///
/// # Errors
/// [`Error::Value`] if `uniform` is outside its range, [`Error::Shape`] if there is no candidate.
pub fn choose_candidate(
    candidates: &[Candidate],
    vocabulary: usize,
    row: &ShardSummary,
    params: &SamplingParams,
    uniform: f64,
) -> Result<(Candidate, f64)> {
    const OP: &str = "choose_candidate";
    check_draw(OP, "candidates", candidates.len(), uniform)?;
    let scores: Vec<f32> = candidates.iter().map(|candidate| candidate.score).collect();
    let (index, total) = distribution::draw(&scores, vocabulary, row.max, params, uniform);
    Ok((candidates[index], total))
}

/// The outcome of a draw, from the token chosen and the row's summary.
///
/// `total`: the sum of the weights of all entries that could have been drawn; not read where the choice is greedy.
pub fn finish(row: &ShardSummary, chosen: Candidate, total: f64, params: &SamplingParams) -> Sampled {
    let stats = row.partial.finish();
    let logp = stats.log_prob(chosen.logit);
    let sampling_logp = if params.is_greedy() {
        0.0
    } else if params.is_plain() {
        logp
    } else {
        let exponent = (chosen.score - row.max) / params.temperature;
        (f64::from(exponent) - total.ln()) as f32
    };
    Sampled { token: chosen.token, logp, sampling_logp, entropy: stats.entropy }
}

/// The rest of a draw from a row whose logits have been gathered: for [`Exchange::Row`].
///
/// `logits`: the whole row; `row`: the summaries of its shards, merged. What is recorded of the policy's own distribution
/// comes from `row`, so it is what the shards of the head compute in training.
///
/// # Errors
/// As [`ShardDraw::new`], and [`Error::Value`] if `uniform` is not in `[0, 1)`.
pub fn sample_row_gathered(
    logits: &[f32],
    row: &ShardSummary,
    history: &[u32],
    params: &SamplingParams,
    uniform: f64,
) -> Result<Sampled> {
    const OP: &str = "sample_row_gathered";
    check_draw(OP, "logits", logits.len(), uniform)?;
    let draw = ShardDraw::open(OP, logits, 0, logits.len(), history, params)?;
    Ok(draw_whole(&draw, row, uniform))
}

fn draw_whole(draw: &ShardDraw, row: &ShardSummary, uniform: f64) -> Sampled {
    let (index, total) = distribution::draw(&draw.scores, draw.scores.len(), row.max, draw.params, uniform);
    finish(row, draw.candidate(index), total, draw.params)
}

/// Chooses a token from one row of finite logits in shards, all held here: [`super::sample_row`] if there is one shard.
///
/// `shards`: the whole row, in order; all but the last that have entries are multiples of [`BLOCK`] long.
///
/// # Errors
/// As [`ShardDraw::new`], and [`Error::Value`] if `uniform` is not in `[0, 1)`.
pub fn sample_row_sharded(
    shards: &[&[f32]],
    history: &[u32],
    params: &SamplingParams,
    uniform: f64,
) -> Result<Sampled> {
    sample("sample_row_sharded", shards, history, params, uniform)
}

/// [`sample_row_sharded`] under the name of the operation that a caller asked for.
pub(super) fn sample(
    op: &'static str,
    shards: &[&[f32]],
    history: &[u32],
    params: &SamplingParams,
    uniform: f64,
) -> Result<Sampled> {
    let vocabulary = shards.iter().map(|shard| shard.len()).sum();
    check_draw(op, "logits", vocabulary, uniform)?;
    let mut draws = Vec::with_capacity(shards.len());
    let mut first_entry = 0;
    for shard in shards {
        draws.push(ShardDraw::open(op, shard, first_entry, vocabulary, history, params)?);
        first_entry += shard.len();
    }
    let row = draws.iter().fold(ShardSummary::EMPTY, |row, draw| row.merge(draw.summary()));
    Ok(match params.exchange() {
        Exchange::Nothing => finish(&row, row.best, 1.0, params),
        Exchange::BlockSums => {
            let sums: Vec<f64> = draws.iter().flat_map(|draw| draw.block_sums(&row)).collect();
            let chosen = choose_block(&sums, uniform)?;
            let token = draws.iter().find_map(|draw| draw.token_in_block(&row, &chosen));
            // The sums are those of the shards here, so one of them holds the block.
            finish(&row, token.unwrap_or(row.best), chosen.total, params)
        }
        Exchange::Candidates => {
            let candidates: Vec<Candidate> = draws.iter().flat_map(|draw| draw.candidates(&row)).collect();
            let (token, total) = choose_candidate(&candidates, vocabulary, &row, params, uniform)?;
            finish(&row, token, total, params)
        }
        Exchange::Row => match draws.as_slice() {
            [draw] => draw_whole(draw, &row, uniform),
            _ => sample_row_gathered(&shards.concat(), &row, history, params, uniform)?,
        },
    })
}

/// An error if there is nothing to draw from or nothing to draw with.
fn check_draw(op: &'static str, what: &'static str, count: usize, uniform: f64) -> Result<()> {
    if count == 0 {
        return Err(Error::Shape { op, what, expected: "at least one".to_string(), got: "none".to_string() });
    }
    if !(0.0..1.0).contains(&uniform) {
        return Err(Error::Value { op, what: "uniform", expected: "in [0, 1)", got: uniform });
    }
    Ok(())
}
