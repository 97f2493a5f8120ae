//! Reward model: pairs of a better and a worse response, as rows hold them or as ratings make them.

use tandem_data::length::{self, LengthReport};
use tandem_data::{DataError, Encoded, Example, Located, Origin, Tokenizer};
use tandem_kernels::rng::{Philox, Purpose};

use super::encode::{encode_all, tell};
use super::rows::stage_rows;
use crate::config::{Config, PairSource, RewardConfig, Stage};
use crate::error::Result;

/// A text to be scored at its last token.
#[derive(Debug, Clone)]
pub struct Text {
    /// Where its row stands.
    pub origin: Origin,
    /// Its ids, prompt included.
    pub ids: Vec<u32>,
}

/// Two of a set's texts, by number.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pair {
    /// The preferred one.
    pub chosen: usize,
    /// The other.
    pub rejected: usize,
    /// The difference of scores that the loss asks for.
    pub margin: f32,
}

/// Texts and the pairs made of them.
#[derive(Debug, Clone)]
pub struct PairSet {
    texts: Vec<Text>,
    pairs: Pairs,
}

#[derive(Debug, Clone)]
enum Pairs {
    Fixed(Vec<Pair>),
    Rated(Rated),
}

/// What the reward stage trains on.
#[derive(Debug, Clone)]
pub struct RewardPairs {
    /// To train on; never empty.
    pub train: PairSet,
    /// Held out: of at most `eval.max_rows` rows, as many pairs at most.
    pub eval: PairSet,
    /// Digest of the rows (lower-case hex).
    pub digest: String,
}

/// The pairs of the reward stage, no text longer than `data.max_tokens`.
///
/// # Errors
/// Rows that are no pairs or have no rating, texts that cannot be tokenised, data of which more than half cannot be used,
/// and ratings that lie too close together for any pair.
pub fn reward_pairs(config: &Config, tokenizer: &Tokenizer) -> Result<RewardPairs> {
    let rows = stage_rows(config, Stage::Reward)?;
    let mut report = LengthReport::default();
    let train = pair_set(rows.train, config, tokenizer, &mut report)?;
    report.check("data.max_tokens")?;
    tell("reward", &report);
    if train.is_empty() {
        let reason = format!("no two ratings differ by more than min_gap = {}; lower it", config.reward.pairs.min_gap);
        return Err(DataError::Setting { what: "reward.pairs".into(), reason }.into());
    }
    let held_out = rows.eval.into_iter().take(config.eval.max_rows).collect();
    let mut eval = pair_set(held_out, config, tokenizer, &mut LengthReport::default())?;
    eval.truncate(config.eval.max_rows);
    Ok(RewardPairs { train, eval, digest: rows.digest })
}

impl PairSet {
    /// Pairs of an epoch.
    pub fn len(&self) -> usize {
        match &self.pairs {
            Pairs::Fixed(pairs) => pairs.len(),
            Pairs::Rated(rated) => rated.len,
        }
    }

    /// Whether there is no pair.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Pair `index` of `epoch`. With ratings the partners are drawn anew for every epoch.
    ///
    /// # Panics
    /// If there is no such pair.
    pub fn pair(&self, epoch: u64, index: usize) -> Pair {
        match &self.pairs {
            Pairs::Fixed(pairs) => pairs[index],
            Pairs::Rated(rated) => rated.pair(epoch, index),
        }
    }

    /// All texts.
    pub fn texts(&self) -> &[Text] {
        &self.texts
    }

    /// Keeps the first `most` pairs.
    fn truncate(&mut self, most: usize) {
        match &mut self.pairs {
            Pairs::Fixed(pairs) => pairs.truncate(most),
            Pairs::Rated(rated) => rated.len = rated.len.min(most),
        }
    }
}

fn pair_set(rows: Vec<Located>, config: &Config, tokenizer: &Tokenizer, report: &mut LengthReport) -> Result<PairSet> {
    match config.reward.pairs.source {
        PairSource::Rows => compared(rows, config, tokenizer, report),
        PairSource::Ratings => rated(rows, config, tokenizer, report),
    }
}

fn compared(rows: Vec<Located>, config: &Config, tokenizer: &Tokenizer, report: &mut LengthReport) -> Result<PairSet> {
    let encoded = encode_all(rows, |Located { origin, example }| {
        let comparison = example.into_comparison(&origin)?;
        let encode = |response: &str| tokenizer.encode_pair(comparison.prompt.as_ref(), response);
        Ok((encode(&comparison.chosen)?, encode(&comparison.rejected)?, comparison.margin))
    })?;
    let (mut texts, mut pairs) = (Vec::new(), Vec::new());
    for (origin, (chosen, rejected, margin)) in encoded {
        let fitted = length::fit_pair(chosen, rejected, config.data.max_tokens, config.data.over_long, report);
        let Some((chosen, rejected)) = fitted else { continue };
        let margin = margin.filter(|_| config.reward.margin).unwrap_or(0.0);
        pairs.push(Pair { chosen: texts.len(), rejected: texts.len() + 1, margin });
        texts.push(Text { origin: origin.clone(), ids: chosen.ids });
        texts.push(Text { origin, ids: rejected.ids });
    }
    Ok(PairSet { texts, pairs: Pairs::Fixed(pairs) })
}

fn rated(rows: Vec<Located>, config: &Config, tokenizer: &Tokenizer, report: &mut LengthReport) -> Result<PairSet> {
    let encoded = encode_all(rows, |Located { origin, example }| match example {
        Example::Text { text, rating: Some(rating) } => Ok((tokenizer.encode_pair(None, &text)?, rating)),
        other => {
            let reason = format!(
                "a {} row without a rating; reward.pairs.source = \"ratings\" needs a text and a rating",
                other.kind()
            );
            Err(DataError::Field { origin: origin.to_string(), reason })
        }
    })?;
    let (mut texts, mut ratings) = (Vec::new(), Vec::new());
    for (origin, (sample, rating)) in encoded {
        let Some(Encoded { ids, .. }) = length::fit(sample, config.data.max_tokens, config.data.over_long, report)
        else {
            continue;
        };
        texts.push(Text { origin, ids });
        ratings.push(rating);
    }
    Ok(PairSet { texts, pairs: Pairs::Rated(Rated::new(ratings, &config.reward, config.run.seed)) })
}

/// Pairs of texts whose ratings differ by more than a gap.
#[derive(Debug, Clone)]
struct Rated {
    ratings: Vec<f32>,
    /// Texts by rising rating.
    ascending: Vec<usize>,
    /// The texts that have an opponent.
    firsts: Vec<First>,
    /// Pairs of an epoch.
    len: usize,
    /// Margin per point of rating.
    margin_scale: f32,
    seed: u64,
}

/// A text and its possible opponents: `ascending[..below]` and `ascending[above..]`.
#[derive(Debug, Clone, Copy)]
struct First {
    text: usize,
    below: usize,
    above: usize,
}

impl Rated {
    fn new(ratings: Vec<f32>, config: &RewardConfig, seed: u64) -> Self {
        let mut ascending: Vec<usize> = (0..ratings.len()).collect();
        ascending.sort_by(|&a, &b| ratings[a].total_cmp(&ratings[b]).then(a.cmp(&b)));
        let gap = |high: f32, low: f32| f64::from(high) - f64::from(low);
        let first = |text: usize| {
            let below = ascending.partition_point(|&other| gap(ratings[text], ratings[other]) > config.pairs.min_gap);
            let above = ascending.partition_point(|&other| gap(ratings[other], ratings[text]) <= config.pairs.min_gap);
            (below > 0 || above < ascending.len()).then_some(First { text, below, above })
        };
        let firsts: Vec<First> = (0..ratings.len()).filter_map(first).collect();
        let len = firsts.len() * config.pairs.per_text;
        let margin_scale = if config.margin { config.margin_scale as f32 } else { 0.0 };
        Self { ratings, ascending, firsts, len, margin_scale, seed }
    }

    /// Text after text, then again with other partners: so the first pairs of a set are of as many texts as possible.
    fn pair(&self, epoch: u64, index: usize) -> Pair {
        let First { text, below, above } = self.firsts[index % self.firsts.len()];
        let round = (index / self.firsts.len()) as u32;
        let opponents = below + self.ascending.len() - above;
        let draw =
            Philox::new(self.seed, Purpose::Order, epoch).below(opponents as u64, text as u64, round, 0) as usize;
        let other = self.ascending[if draw < below { draw } else { above + draw - below }];
        let gap = self.ratings[text] - self.ratings[other];
        let (chosen, rejected) = if gap > 0.0 { (text, other) } else { (other, text) };
        Pair { chosen, rejected, margin: self.margin_scale * gap.abs() }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::samples::train_tokenizer;
    use super::*;
    use crate::config::{PairsConfig, TrainTokenizerConfig};
    use crate::testing;

    fn rated(per_text: usize) -> Rated {
        let pairs = PairsConfig { source: PairSource::Ratings, min_gap: 2.0, per_text };
        let config = RewardConfig { pairs, margin: true, margin_scale: 0.5, ..RewardConfig::default() };
        Rated::new(vec![0.0, 3.0, -2.0, 2.0, 0.5], &config, 7)
    }

    #[test]
    fn the_better_text_is_chosen_and_the_gap_is_wide_enough() {
        let set = rated(3);
        for epoch in 0..20 {
            for index in 0..set.len {
                let pair = set.pair(epoch, index);
                let gap = set.ratings[pair.chosen] - set.ratings[pair.rejected];
                assert!(gap > 2.0, "{pair:?}");
                assert_eq!(pair.margin, 0.5 * gap);
                let first = set.firsts[index % set.firsts.len()].text;
                assert!(pair.chosen == first || pair.rejected == first);
            }
        }
    }

    #[test]
    fn every_text_with_an_opponent_is_first_and_meets_all_of_them() {
        let set = rated(3);
        assert_eq!(set.firsts.iter().map(|first| first.text).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
        assert_eq!(set.len, 15);
        let met = |text: usize| -> BTreeSet<usize> {
            (0..200).map(|epoch| set.pair(epoch, text)).map(|pair| pair.chosen + pair.rejected - text).collect()
        };
        // Exactly 2 apart is not more than 2.
        assert_eq!(met(0), BTreeSet::from([1]));
        assert_eq!(met(2), BTreeSet::from([1, 3, 4]));
        assert_eq!(set.pair(3, 9), set.pair(3, 9));
    }

    #[test]
    fn pairs_of_held_out_texts_are_limited() {
        let dir = tempfile::tempdir().unwrap();
        let more = "[reward.pairs]\nsource = 'ratings'\n[eval]\nmax_rows = 7";
        let config = testing::rated(dir.path(), 300, more);
        let tokenizer =
            train_tokenizer(&config, &TrainTokenizerConfig { vocab_size: 300, ..Default::default() }).unwrap();
        let pairs = reward_pairs(&config, &tokenizer).unwrap();
        assert_eq!(pairs.eval.len(), 7);
        assert_eq!(pairs.train.len(), 4 * pairs.train.texts().len());
        let ids = &pairs.train.texts()[0].ids;
        assert_eq!((ids[0], ids[ids.len() - 1]), (tokenizer.eos(), tokenizer.eos()), "begins and ends");
    }
}
