//! SFT: demonstrations as ids, and the texts that a tokenizer is trained on.

use tandem_data::length::{self, LengthReport};
use tandem_data::{BpeTraining, DataError, Demonstration, Encoded, Located, Origin, Prompt, Tokenizer};

use super::encode::{encode_all, tell};
use super::rows::stage_rows;
use crate::config::{Config, Stage, TrainTokenizerConfig};
use crate::error::Result;

/// A demonstration and its row.
#[derive(Debug, Clone)]
pub struct SftSample {
    /// Where the row stands.
    pub origin: Origin,
    /// Prompt and response, at least two tokens together.
    pub encoded: Encoded,
}

/// What SFT trains on.
#[derive(Debug, Clone)]
pub struct SftSamples {
    /// To train on; never empty.
    pub train: Vec<SftSample>,
    /// Held out, at most `eval.max_rows`.
    pub eval: Vec<SftSample>,
    /// Digest of the rows (lower-case hex).
    pub digest: String,
    /// What became of the training rows.
    pub report: LengthReport,
}

/// The demonstrations of the SFT stage, none longer than `data.max_tokens`.
///
/// # Errors
/// Rows without a response, texts that cannot be tokenised, and data of which more than half is too long.
pub fn sft_samples(config: &Config, tokenizer: &Tokenizer) -> Result<SftSamples> {
    let rows = stage_rows(config, Stage::Sft)?;
    let mut report = LengthReport::default();
    let train = encode(rows.train, config, tokenizer, &mut report)?;
    report.check("data.max_tokens")?;
    tell("sft", &report);
    let held_out = rows.eval.into_iter().take(config.eval.max_rows).collect();
    let eval = encode(held_out, config, tokenizer, &mut LengthReport::default())?;
    Ok(SftSamples { train, eval, digest: rows.digest, report })
}

fn encode(
    rows: Vec<Located>,
    config: &Config,
    tokenizer: &Tokenizer,
    report: &mut LengthReport,
) -> Result<Vec<SftSample>> {
    let encoded = encode_all(rows, |Located { origin, example }| {
        let encoded = tokenizer.encode_demonstration(&example.into_demonstration(&origin)?)?;
        if encoded.ids.len() < 2 {
            let reason = "its text makes no token to learn; repair or remove the row".into();
            return Err(DataError::Field { origin: origin.to_string(), reason });
        }
        Ok(encoded)
    })?;
    let fit = |(origin, sample)| {
        let encoded = length::fit(sample, config.data.max_tokens, config.data.over_long, report)?;
        Some(SftSample { origin, encoded })
    };
    Ok(encoded.into_iter().filter_map(fit).collect())
}

/// Trains a tokenizer on the texts that SFT trains on, and on no others: held-out text must be new to it too.
///
/// # Errors
/// As [`sft_samples`].
pub fn train_tokenizer(config: &Config, train: &TrainTokenizerConfig) -> Result<Tokenizer> {
    let rows = stage_rows(config, Stage::Sft)?.train;
    let mut texts = Vec::with_capacity(rows.len());
    for Located { origin, example } in rows {
        let Demonstration { prompt, response } = example.into_demonstration(&origin)?;
        match prompt {
            Some(Prompt::Text(text)) => texts.push(text),
            Some(Prompt::Messages(messages)) => texts.extend(messages.into_iter().map(|message| message.content)),
            None => {}
        }
        texts.push(response);
    }
    let TrainTokenizerConfig { vocab_size, min_frequency, begin_with_bos } = *train;
    Ok(BpeTraining { vocab_size, min_frequency, begin_with_bos }.train(texts)?)
}
