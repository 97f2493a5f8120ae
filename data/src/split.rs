//! Dividing rows among phases (SFT, reward, PPO) and setting some aside for evaluation, by content.
//!
//! Where a row goes depends on a hash of its content and on nothing else, so it stays there when the file is reordered, when
//! rows are added, or when the data comes in another format; and of two equal rows both go to the same place, so nothing
//! that was trained on is ever evaluated on.

use serde::{Deserialize, Serialize};

use crate::error::{DataError, Result};
use crate::row::Row;

/// How rows are divided.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Split {
    shares: Vec<u32>,
    eval_fraction: f64,
    seed: u64,
}

/// Where a row belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Part {
    /// The phase, counted from 0.
    pub phase: usize,
    /// Whether the row is held out from training, for evaluation.
    pub eval: bool,
}

impl Split {
    /// Phases with the given shares (only their proportions count; a share of 0 is an empty phase), of each of which
    /// `eval_fraction` is held out.
    ///
    /// # Errors
    /// No share above zero, or a fraction outside `0..1`.
    pub fn new(shares: Vec<u32>, eval_fraction: f64, seed: u64) -> Result<Self> {
        if shares.iter().all(|&share| share == 0) {
            return Err(setting("split", format!("{shares:?} gives every phase nothing; write it like \"2,4,4\"")));
        }
        if !(0.0..1.0).contains(&eval_fraction) {
            return Err(setting("eval_fraction", format!("{eval_fraction} is not at least 0 and below 1")));
        }
        Ok(Self { shares, eval_fraction, seed })
    }

    /// Shares as they are written in a config: `"2,4,4"`.
    ///
    /// # Errors
    /// Anything but whole numbers with commas between them, and what [`Split::new`] refuses.
    pub fn parse(shares: &str, eval_fraction: f64, seed: u64) -> Result<Self> {
        let parsed: Result<Vec<u32>, _> = shares.split(',').map(|share| share.trim().parse()).collect();
        match parsed {
            Ok(parsed) => Self::new(parsed, eval_fraction, seed),
            Err(_) => Err(setting("split", format!("{shares:?} is not a list of whole numbers like \"2,4,4\""))),
        }
    }

    /// The number of phases.
    pub fn phases(&self) -> usize {
        self.shares.len()
    }

    /// Where a row belongs.
    pub fn part(&self, row: &Row) -> Part {
        self.place(&row.content_hash(self.seed))
    }

    /// The rows of one part, in their order.
    pub fn select<'a>(&self, rows: &'a [Row], part: Part) -> Vec<&'a Row> {
        rows.iter().filter(|row| self.part(row) == part).collect()
    }

    fn place(&self, hash: &[u8; 32]) -> Part {
        // Two independent numbers from one hash; the remainder's bias is below 2^-32.
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| hash[at + byte]));
        let total: u64 = self.shares.iter().map(|&share| u64::from(share)).sum();
        let mut ticket = word(0) % total;
        let mut phase = 0;
        while ticket >= u64::from(self.shares[phase]) {
            ticket -= u64::from(self.shares[phase]);
            phase += 1;
        }
        // 53 bits make an exact f64 in [0, 1).
        let eval = ((word(8) >> 11) as f64) / (1u64 << 53) as f64;
        Part { phase, eval: eval < self.eval_fraction }
    }
}

fn setting(what: &str, reason: String) -> DataError {
    DataError::Setting { what: what.to_owned(), reason }
}
