//! From the rows of the data files to the token ids that each stage trains on.
//!
//! | file | what is in it |
//! |---|---|
//! | `rows` | the rows of a stage: divided by content, held out, blended |
//! | `samples` | SFT: demonstrations; and the texts that a tokenizer is trained on |
//! | `pairs` | reward model: pairs, from rows or from ratings |
//! | `prompts` | PPO: what is to be answered |
//! | `encode` | rows to ids in parallel, with errors that name the row |

mod encode;
mod pairs;
mod prompts;
mod rows;
mod samples;

pub use pairs::{Pair, PairSet, RewardPairs, Text, reward_pairs};
pub use prompts::{PromptRow, Prompts, prompts};
pub use rows::{StageRows, stage_rows};
pub use samples::{SftSample, SftSamples, sft_samples, train_tokenizer};
