//! What happens to samples that are longer than the model's context.

use serde::{Deserialize, Serialize};

use crate::error::{DataError, Result};
use crate::limits;
use crate::tokenizer::Encoded;

/// The policy for samples that are too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OverLong {
    /// Cut the prompt's beginning. A sample whose response alone is too long is dropped.
    TruncateLeft,
    /// Cut the response's end, and with it the end-of-sequence token: a cut response must not teach where to end.
    TruncateRight,
    /// Leave the sample out.
    #[default]
    Drop,
}

/// What became of the samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LengthReport {
    /// Samples that fitted.
    pub whole: usize,
    /// Samples that were cut to fit.
    pub truncated: usize,
    /// Samples left out because they were too long.
    pub too_long: usize,
    /// Pairs left out because both responses were the same, perhaps only after cutting: they would teach nothing.
    pub identical: usize,
}

impl LengthReport {
    /// Samples that are used.
    pub fn kept(&self) -> usize {
        self.whole + self.truncated
    }

    /// Fails if nothing is left, or if more than half of the samples were dropped: then it is not the samples that are wrong.
    ///
    /// # Errors
    /// Gives the counts. `what` names the data.
    pub fn check(&self, what: &str) -> Result<()> {
        let dropped = self.too_long + self.identical;
        let all = self.kept() + dropped;
        if self.kept() > 0 && dropped as f64 <= limits::DROPPED_FRACTION * all as f64 {
            return Ok(());
        }
        let reason = format!(
            "{dropped} of {all} samples were dropped ({} too long, {} with identical responses); raise max_len, set \
             over_long = \"truncate_left\", or look at the data",
            self.too_long, self.identical
        );
        Err(DataError::Setting { what: what.to_owned(), reason })
    }
}

/// Fits a prompt into `max_len` ids; its beginning is what goes, under either truncation, as the end is what is to be answered.
pub fn fit_prompt(ids: Vec<u32>, max_len: usize, policy: OverLong, report: &mut LengthReport) -> Option<Vec<u32>> {
    let over = ids.len().saturating_sub(max_len);
    match policy {
        _ if over == 0 => report.whole += 1,
        OverLong::TruncateLeft | OverLong::TruncateRight if max_len > 0 => report.truncated += 1,
        _ => {
            report.too_long += 1;
            return None;
        }
    }
    Some(ids[over..].to_vec())
}

/// Fits a sample into `max_len` ids, or drops it.
pub fn fit(sample: Encoded, max_len: usize, policy: OverLong, report: &mut LengthReport) -> Option<Encoded> {
    let over = sample.ids.len().saturating_sub(max_len);
    if over == 0 {
        report.whole += 1;
        return Some(sample);
    }
    let cut = cut(&sample, over, over, policy);
    match cut {
        Some(_) => report.truncated += 1,
        None => report.too_long += 1,
    }
    cut
}

/// Fits two responses to one prompt. The prompt is cut equally for both, so that they still answer the same.
pub fn fit_pair(
    chosen: Encoded,
    rejected: Encoded,
    max_len: usize,
    policy: OverLong,
    report: &mut LengthReport,
) -> Option<(Encoded, Encoded)> {
    let over = |sample: &Encoded| sample.ids.len().saturating_sub(max_len);
    let most = over(&chosen).max(over(&rejected));
    let fitted = if most == 0 {
        Some((chosen, rejected))
    } else {
        cut(&chosen, most, over(&chosen), policy).zip(cut(&rejected, most, over(&rejected), policy))
    };
    match &fitted {
        None => report.too_long += 1,
        Some((chosen, rejected)) if chosen.response() == rejected.response() => {
            report.identical += 1;
            return None;
        }
        Some(_) if most > 0 => report.truncated += 1,
        Some(_) => report.whole += 1,
    }
    fitted
}

/// Cuts `left` ids of the prompt or `right` ids of the response. At least one id of what is cut must stay.
fn cut(sample: &Encoded, left: usize, right: usize, policy: OverLong) -> Option<Encoded> {
    match policy {
        OverLong::TruncateLeft if left < sample.prompt_len => {
            Some(Encoded { ids: sample.ids[left..].to_vec(), prompt_len: sample.prompt_len - left })
        }
        OverLong::TruncateRight if right < sample.response().len() => {
            let ids = sample.ids[..sample.ids.len() - right].to_vec();
            Some(Encoded { ids, prompt_len: sample.prompt_len })
        }
        _ => None,
    }
}
