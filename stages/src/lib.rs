//! RLHF in three stages: supervised fine-tuning, reward modelling, PPO.
//!
//! | module | what is in it |
//! |---|---|
//! | [`config`] | the TOML file as typed structs, checked |
//! | [`plan`] | which models a stage starts from |
//! | [`allocator`] | where the commands' memory comes from |
//! | [`cli`] | the command line, and the way from it to an exit code |
//! | [`models`] | loading and exporting models |
//! | [`dataset`] | rows to token ids, for each stage |
//! | [`ranks`] | one rank or many, and how they end |
//! | [`run`] | a stage's directory: resuming, log, checkpoints, export |
//! | [`sft`] | the first stage |
//! | [`reward`] | the second stage |
//! | [`supervised`] | the loop that these two share |
//! | [`ppo`] | the third stage |
//! | [`rlhf`] | all stages in a row |
//! | [`chat`] | talking to a model |
//! | [`scoring`] | what responses are worth |
//! | [`footprint`] | what a rank will hold in memory and send |
//! | [`monitor`] | metrics, progress, tables |
//! | [`stop`] | being asked to stop |
//! | [`error`] | what can end a stage |
//!
//! A stage is one readable loop that uses these; the binaries are a line each.

mod adapters;
pub mod allocator;
pub mod chat;
pub mod cli;
pub mod config;
pub mod dataset;
mod dry_run;
pub mod error;
pub mod footprint;
pub mod models;
pub mod monitor;
pub mod plan;
pub mod ppo;
pub mod ranks;
pub mod reward;
pub mod rlhf;
pub mod run;
pub mod scoring;
pub mod sft;
pub mod stop;
pub mod supervised;

#[cfg(test)]
mod testing;
