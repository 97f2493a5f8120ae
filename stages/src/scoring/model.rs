//! Scores of a reward model: the scalar head at the last token, in standard deviations from the mean that was measured when
//! the model was trained.

use tandem_data::packing::{Packing, pack_by_tokens};
use tandem_data::{Prompt, Tokenizer};
use tandem_engine::model::families::RewardScale;
use tandem_engine::model::unit::Head;
use tandem_engine::{Model, Packed};

use super::{ScoreItem, Scorer, finite};
use crate::config::Role;
use crate::error::{Result, StageError};
use crate::models;
use crate::ranks::Team;

/// A frozen reward model.
pub struct ModelScorer {
    team: Team,
    model: Model,
    scale: Option<RewardScale>,
    /// The model's own tokenizer, if the policy has another one.
    reader: Option<Reader>,
    tokens_per_micro_batch: usize,
}

/// Reads texts anew for a model with another vocabulary than the policy's.
struct Reader {
    tokenizer: Tokenizer,
    /// With one of these the policy ends a response.
    policy_stops: Vec<u32>,
}

impl ModelScorer {
    /// Loads the reward model at `path`, a folder or hub id. `policy` is the tokenizer of the ids to be scored; a model with
    /// the same vocabulary reads them as they are, any other one reads the texts.
    ///
    /// # Errors
    /// If the model cannot be loaded or has no scalar head.
    pub fn load(team: &Team, path: &str, policy: &Tokenizer, tokens_per_micro_batch: usize) -> Result<Self> {
        let loaded = models::load(path, Head::Scalar)?;
        if loaded.missing_score {
            return Err(StageError::Reward(format!(
                "{path} is a language model without a scalar head; train a reward model from it with `reward`, and name \
                 its export"
            )));
        }
        let same = loaded.tokenizer.files().tokenizer() == policy.files().tokenizer();
        let reader = (!same).then(|| Reader { tokenizer: loaded.tokenizer, policy_stops: policy.stop_ids().to_vec() });
        let model = loaded.blueprint.place(&team.placement(Role::RewardModel)?)?;
        Ok(Self { team: team.clone(), model, scale: loaded.reward_scale, reader, tokens_per_micro_batch })
    }

    /// The ids of an item in the model's own vocabulary.
    fn ids(&self, item: &ScoreItem<'_>) -> Result<Vec<u32>> {
        match &self.reader {
            None => Ok([item.prompt_ids, item.response_ids].concat()),
            Some(reader) => reader.read(item),
        }
    }
}

impl Reader {
    fn read(&self, item: &ScoreItem<'_>) -> Result<Vec<u32>> {
        let prompt = Prompt::Text(item.prompt_text.to_owned());
        let mut ids = self.tokenizer.encode_pair(Some(&prompt), item.response_text)?.ids;
        let ended = item.response_ids.last().is_some_and(|last| self.policy_stops.contains(last));
        if !ended {
            // A response that was cut off does not end here either.
            ids.pop();
        }
        Ok(ids)
    }
}

impl Scorer for ModelScorer {
    fn score(&mut self, items: &[ScoreItem<'_>]) -> Result<Vec<f32>> {
        let sequences: Vec<Vec<u32>> = items.iter().map(|item| self.ids(item)).collect::<Result<_>>()?;
        let lengths: Vec<usize> = sequences.iter().map(Vec::len).collect();
        let longest = self.model.spec().max_positions;
        // A token's result does not depend on its company, so neither do scores on how they are packed.
        let batches = pack_by_tokens(&lengths, self.tokens_per_micro_batch, longest, Packing::FirstFitDecreasing)
            .map_err(|error| StageError::Reward(format!("the reward model cannot read the responses: {error}")))?;
        let mut scores = vec![0.0; items.len()];
        let scored = self.team.score(&self.model, &batches, |batch| {
            let packed = Packed::from_sequences(batch.iter().map(|&index| &sequences[index]));
            let last_rows: Vec<u32> = packed.cu_seqlens[1..].iter().map(|end| end - 1).collect();
            Ok(self.model.scores(&packed, &last_rows)?.to_vec1()?)
        })?;
        for (batch, raw) in batches.iter().zip(scored) {
            for (&index, raw) in batch.iter().zip(raw) {
                scores[index] = self.scale.map_or(raw, |scale| scale.apply(f64::from(raw)) as f32);
            }
        }
        finite(scores, items)
    }
}

#[cfg(test)]
mod tests;
