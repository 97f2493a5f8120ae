//! RLHF in three stages: supervised fine-tuning, reward modelling, PPO.
//!
//! | module | what is in it |
//! |---|---|
//! | [`config`] | the TOML file as typed structs, checked |
//! | [`plan`] | which models a stage starts from |
//! | [`cli`] | the command line, and the way from it to an exit code |
//! | [`run`] | a stage's directory: resuming, log, checkpoints, export |
//! | [`monitor`] | metrics, progress, tables |
//! | [`stop`] | being asked to stop |
//! | [`error`] | what can end a stage |
//!
//! A stage is one readable loop that uses these; the binaries are a line each.

pub mod cli;
pub mod config;
pub mod error;
pub mod monitor;
pub mod plan;
pub mod run;
pub mod stop;
