//! The ranks of a stage at work: each one's place, its share of a step, and what all of them have found together.

use std::path::PathBuf;
use std::sync::Arc;

use tandem_engine::Model;
use tandem_engine::parallel::{self, Parallel, Placement, ZeroStage};

use crate::cli::Launch;
use crate::config::{Config, Role, Stage};
use crate::error::{Result, StageError};
use crate::run::Run;
use crate::supervised::batches;

/// This rank among those of a stage.
#[derive(Debug, Clone)]
pub struct Team {
    parallel: Arc<Parallel>,
    stage: Stage,
    config: Arc<Config>,
    /// Where what is kept in files goes, if nothing else is said.
    scratch: PathBuf,
}

/// This rank's part of a step: numbers of passes, and the rows of each; `None` where a lane has none left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// Numbers of this rank's passes among all passes of the step, and their rows.
    pub passes: Vec<(usize, Option<Vec<usize>>)>,
    /// Passes of all ranks.
    pub all: usize,
}

impl Team {
    /// The ranks of `launch`, in `run`'s order of sums. All ranks call it together.
    ///
    /// # Errors
    /// Sizes that do not come out even, or a peer that failed.
    pub fn new(launch: &Launch, run: &Run, stage: Stage) -> Result<Self> {
        let (config, lanes) = (&launch.config, run.lanes());
        let parallel = Parallel::new(
            &launch.world,
            &parallel::ParallelConfig {
                tensor: config.parallel.tensor,
                pipeline: config.parallel.pipeline,
                data_lanes: lanes.data,
                tensor_lanes: lanes.tensor,
                inference_tensor: config.generating(stage),
            },
        )?;
        Ok(Self { parallel, stage, config: Arc::new(config.clone()), scratch: run.path().join("scratch") })
    }

    /// One rank alone, with the defaults.
    pub fn solo() -> Self {
        Self {
            parallel: Parallel::solo(),
            stage: Stage::Sft,
            config: Arc::new(Config::default()),
            scratch: std::env::temp_dir(),
        }
    }

    /// This rank's place.
    pub fn parallel(&self) -> &Arc<Parallel> {
        &self.parallel
    }

    /// Where the model of `role` is kept.
    ///
    /// # Errors
    /// None for a configuration that was checked.
    pub fn placement(&self, role: Role) -> Result<Placement> {
        let (section, shared) = (self.config.role(role), &self.config.parallel);
        Ok(Placement {
            precision: self.config.run.precision,
            is_frozen: !role.is_trained(self.stage),
            weights: section.weights,
            persistence_threshold: shared.persistence_threshold,
            prefetch_units: shared.prefetch_units,
            reduce_bucket_bytes: (shared.reduce_bucket_mib as usize) << 20,
            offload: match section.offload {
                crate::config::Offload::None => parallel::Offload::None,
                crate::config::Offload::Optimizer => parallel::Offload::Optimizer,
                crate::config::Offload::All => parallel::Offload::All,
            },
            offload_dir: Some(section.offload_dir.clone().unwrap_or_else(|| self.scratch.clone())),
            ..Placement::of(self.parallel.clone(), ZeroStage::try_from(section.zero_stage).map_err(StageError::bug)?)
        })
    }

    /// Deals out the rows of a step, `lengths` tokens each: first to lanes, neighbours together and about equally many tokens
    /// each; then to passes of at most `budget` tokens, or one row that has more.
    ///
    /// Neither depends on the number of ranks; that decides only who makes which pass.
    ///
    /// # Errors
    /// A row without tokens.
    pub fn share(&self, lengths: &[usize], budget: usize) -> Result<Share> {
        let lanes = self.parallel.data_lanes;
        let mut rows = vec![Vec::new(); lanes];
        let total = 2 * lengths.iter().sum::<usize>().max(1);
        let mut before = 0;
        for (row, &length) in lengths.iter().enumerate() {
            // The lane in which the row's middle falls.
            rows[((2 * before + length) * lanes / total).min(lanes - 1)].push(row);
            before += length;
        }
        let mut of_lanes = Vec::with_capacity(lanes);
        for rows in &rows {
            let lengths: Vec<usize> = rows.iter().map(|&row| lengths[row]).collect();
            let groups = batches(&lengths, budget)?;
            of_lanes.push(groups.into_iter().map(|group| group.into_iter().map(|at| rows[at]).collect()).collect());
        }
        let of_lanes: Vec<Vec<Vec<usize>>> = of_lanes;
        let rounds = of_lanes.iter().map(Vec::len).max().unwrap_or(0);
        let of_round = |round: usize| {
            let lane = move |lane: usize| (round * lanes + lane, lane);
            self.parallel.lanes().map(lane).map(move |(number, lane)| (number, lane, round))
        };
        let passes = (0..rounds)
            .flat_map(of_round)
            .map(|(number, lane, round)| (number, of_lanes[lane].get(round).cloned()))
            .collect();
        Ok(Share { passes, all: rounds * lanes })
    }

    /// What all ranks have found in the passes of a step, in the order of the passes. `own` are this rank's results; where
    /// several ranks have made a pass together, one of them tells.
    ///
    /// # Errors
    /// A peer that failed.
    pub fn gather<const K: usize>(&self, own: &[(usize, [f64; K])], all: usize) -> Result<Vec<Option<[f64; K]>>> {
        let mut message = Vec::new();
        if self.parallel.at.tensor == 0 && self.parallel.is_last_stage() {
            for (pass, numbers) in own {
                message.extend((*pass as u64).to_le_bytes());
                message.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
            }
        }
        let mut found = vec![None; all];
        for message in self.parallel.world.gather("results of passes", &message)? {
            for words in message.as_chunks::<8>().0.chunks(1 + K) {
                let pass = u64::from_le_bytes(words[0]) as usize;
                if let (Some(slot), [_, numbers @ ..]) = (found.get_mut(pass), words) {
                    *slot = Some(std::array::from_fn(|index| {
                        numbers.get(index).map_or(f64::NAN, |word| f64::from_le_bytes(*word))
                    }));
                }
            }
        }
        Ok(found)
    }

    /// Lets `model` score `batches` of rows, dealt out to the data-parallel ranks; every rank gets all results, in order.
    ///
    /// # Errors
    /// What `compute` refuses, or a peer that failed.
    pub fn score(
        &self,
        model: &Model,
        batches: &[Vec<usize>],
        compute: impl Fn(&[usize]) -> Result<Vec<f32>>,
    ) -> Result<Vec<Vec<f32>>> {
        let data = &self.parallel.data;
        let mut message = Vec::new();
        for first in (0..batches.len()).step_by(data.size()) {
            match batches.get(first + data.rank()) {
                Some(rows) => {
                    let numbers = compute(rows)?;
                    message.extend((numbers.len() as u64).to_le_bytes());
                    message.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
                }
                // Sliced weights are brought together by all ranks, those without rows too.
                None => model.join_scoring()?,
            }
        }
        let messages = data.gather("scores", &message)?;
        let mut rest: Vec<&[u8]> = messages.iter().map(Vec::as_slice).collect();
        let mut results = Vec::with_capacity(batches.len());
        for batch in 0..batches.len() {
            let of_rank = &mut rest[batch % data.size()];
            let lost = || StageError::bug("the scores of a rank are cut off");
            let (count, later) = of_rank.split_first_chunk::<8>().ok_or_else(lost)?;
            let bytes = 4 * u64::from_le_bytes(*count) as usize;
            let (numbers, later) = later.split_at_checked(bytes).ok_or_else(lost)?;
            *of_rank = later;
            results.push(numbers.as_chunks::<4>().0.iter().map(|four| f32::from_le_bytes(*four)).collect());
        }
        Ok(results)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tandem_collective::{Collective, Threads};

    use super::*;

    fn team(world: &Arc<dyn Collective>, data_lanes: usize) -> Team {
        let config = parallel::ParallelConfig { data_lanes, ..parallel::ParallelConfig::default() };
        Team { parallel: Parallel::new(world, &config).unwrap(), ..Team::solo() }
    }

    fn on_ranks<T: Send>(world: usize, body: impl Fn(Arc<dyn Collective>) -> T + Sync) -> Vec<T> {
        let ranks = Threads::world(world, Duration::from_secs(30));
        std::thread::scope(|scope| {
            let threads: Vec<_> = ranks.into_iter().map(|rank| scope.spawn(|| body(rank))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn the_passes_do_not_depend_on_the_ranks() {
        let lengths = [5, 9, 3, 30, 2, 2, 7, 1, 1, 12];
        let whole = {
            let world: Arc<dyn Collective> = Arc::new(tandem_collective::Solo::default());
            team(&world, 4).share(&lengths, 12).unwrap()
        };
        let mut rows: Vec<usize> = whole.passes.iter().filter_map(|(_, rows)| rows.clone()).flatten().collect();
        rows.sort_unstable();
        assert_eq!(rows, (0..10).collect::<Vec<_>>(), "every row once");
        for world in [2, 4] {
            let shares = on_ranks(world, |rank| team(&rank, 4).share(&lengths, 12).unwrap());
            assert!(shares.iter().all(|share| share.passes.len() == shares[0].passes.len()));
            let mut passes: Vec<_> = shares.into_iter().flat_map(|share| share.passes).collect();
            passes.sort_by_key(|(number, _)| *number);
            assert_eq!(passes, whole.passes);
        }
    }

    #[test]
    fn fewer_rows_than_lanes_leave_lanes_without() {
        let share = Team { ..Team::solo() }.share(&[3], 8).unwrap();
        assert_eq!(share, Share { passes: vec![(0, Some(vec![0]))], all: 1 });
        let all = on_ranks(4, |rank| team(&rank, 4).share(&[3], 8).unwrap());
        assert!(all.iter().all(|share| share.passes.len() == 1 && share.all == 4));
        assert_eq!(all.iter().filter(|share| share.passes[0].1.is_some()).count(), 1);
    }

    #[test]
    fn every_rank_learns_all_results_in_order() {
        let found = on_ranks(2, |rank| {
            let (me, team) = (rank.rank(), team(&rank, 2));
            team.gather(&[(me, [me as f64, 0.5]), (me + 2, [10.0, f64::NAN])], 5).unwrap()
        });
        for rank in found {
            assert_eq!((rank[0], rank[1], rank[4]), (Some([0.0, 0.5]), Some([1.0, 0.5]), None));
            assert!(rank[3].unwrap()[1].is_nan());
        }
    }
}
