//! Whether all ranks are about to do the same: asked once, before anything else.

use tandem_collective::Tag;

use super::LEADER;
use crate::cli::Launch;
use crate::config::ConfigError;
use crate::error::{Result, StageError};

const TAG: Tag = Tag::new("start", 0);
/// What must be the same, in the order of its digests.
const PARTS: [&str; 3] = ["version of the program", "configuration", "number of ranks"];
const DIGEST_BYTES: usize = 32;

/// Compares digests of program, plan and world.
///
/// # Errors
/// [`ConfigError::RanksDiffer`] naming the first rank that differs from the leader, on all ranks.
pub(super) fn check(launch: &Launch) -> Result<()> {
    let world = &*launch.world;
    let program = format!("{} {}", env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"));
    let plan = serde_json::to_string(&(&launch.config, launch.resume.is_auto())).map_err(StageError::bug)?;
    let mine: Vec<u8> = [program, plan, world.world().to_string()]
        .iter()
        .flat_map(|part| *blake3::hash(part.as_bytes()).as_bytes())
        .collect();
    let mut all = vec![0; mine.len() * world.world()];
    world.all_gather(TAG, &mine, &mut all)?;
    match first_difference(&all) {
        None => Ok(()),
        Some((rank, what)) => Err(ConfigError::RanksDiffer { rank, leader: LEADER, what }.into()),
    }
}

/// The first rank whose digests are not those of the leader, and what differs.
fn first_difference(all: &[u8]) -> Option<(usize, &'static str)> {
    let ranks: Vec<&[u8]> = all.chunks(PARTS.len() * DIGEST_BYTES).collect();
    ranks.iter().enumerate().find_map(|(rank, digests)| {
        let pairs = digests.chunks(DIGEST_BYTES).zip(ranks[LEADER].chunks(DIGEST_BYTES));
        PARTS.into_iter().zip(pairs).find(|(_, (one, other))| one != other).map(|(what, _)| (rank, what))
    })
}
