//! How this process was started, and the communicator that follows from it.
//!
//! A launcher tells its processes their place in environment variables, each launcher in its own. [`detect`] reads them;
//! it is a pure function of a look-up, so that every launcher can be tested without one. [`connect`] turns the answer
//! into a communicator, or into an error that says which launcher or cargo feature is missing: ranks that do not find
//! each other must not go on as many separate runs of one.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::collective::Collective;
use crate::error::{Error, Result};
use crate::solo::Solo;

/// Which launcher started this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LauncherKind {
    /// `torchrun`, the DeepSpeed launcher, or whatever else sets `RANK` and `WORLD_SIZE`.
    Torch,
    /// `mpirun` of Open MPI.
    OpenMpi,
    /// `mpirun` or `mpiexec` of MPICH or Intel MPI (hydra).
    Hydra,
    /// MVAPICH.
    Mvapich,
    /// `srun`.
    Slurm,
    /// None: a process by itself.
    Single,
}

impl LauncherKind {
    /// Whether ranks started this way meet through MPI.
    pub fn is_mpi(self) -> bool {
        matches!(self, Self::OpenMpi | Self::Hydra | Self::Mvapich | Self::Slurm)
    }
}

impl fmt::Display for LauncherKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Torch => "a torchrun-style launcher",
            Self::OpenMpi => "Open MPI's mpirun",
            Self::Hydra => "MPICH's mpirun",
            Self::Mvapich => "MVAPICH's mpirun",
            Self::Slurm => "srun",
            Self::Single => "no launcher",
        })
    }
}

/// What the launcher said about this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launcher {
    /// Who started it.
    pub kind: LauncherKind,
    /// Its rank, `0..world`.
    pub rank: usize,
    /// The number of ranks.
    pub world: usize,
    /// Its number among the ranks of its machine; 0 where the launcher does not say.
    pub local_rank: usize,
    /// The number of ranks on its machine; 1 where the launcher does not say.
    pub local_world: usize,
}

impl Launcher {
    const SINGLE: Self = Self { kind: LauncherKind::Single, rank: 0, world: 1, local_rank: 0, local_world: 1 };
}

/// The variables of one launcher.
struct Names {
    kind: LauncherKind,
    rank: &'static str,
    world: &'static str,
    local_rank: &'static [&'static str],
    local_world: &'static [&'static str],
}

/// In the order in which they are believed. Slurm comes last, because `srun` may itself start an `mpirun`.
const LAUNCHERS: [Names; 5] = [
    Names {
        kind: LauncherKind::Torch,
        rank: "RANK",
        world: "WORLD_SIZE",
        local_rank: &["LOCAL_RANK"],
        local_world: &["LOCAL_WORLD_SIZE", "LOCAL_SIZE"],
    },
    Names {
        kind: LauncherKind::OpenMpi,
        rank: "OMPI_COMM_WORLD_RANK",
        world: "OMPI_COMM_WORLD_SIZE",
        local_rank: &["OMPI_COMM_WORLD_LOCAL_RANK"],
        local_world: &["OMPI_COMM_WORLD_LOCAL_SIZE"],
    },
    Names {
        kind: LauncherKind::Hydra,
        rank: "PMI_RANK",
        world: "PMI_SIZE",
        local_rank: &["MPI_LOCALRANKID"],
        local_world: &["MPI_LOCALNRANKS"],
    },
    Names {
        kind: LauncherKind::Mvapich,
        rank: "MV2_COMM_WORLD_RANK",
        world: "MV2_COMM_WORLD_SIZE",
        local_rank: &["MV2_COMM_WORLD_LOCAL_RANK"],
        local_world: &["MV2_COMM_WORLD_LOCAL_SIZE"],
    },
    // SLURM_NTASKS is also set in the shell of an sbatch script, where one plain process is legitimate; the size of the
    // step is set only by srun.
    Names {
        kind: LauncherKind::Slurm,
        rank: "SLURM_PROCID",
        world: "SLURM_STEP_NUM_TASKS",
        local_rank: &["SLURM_LOCALID"],
        local_world: &[],
    },
];

/// Reads how this process was started from `lookup`, which gives the value of an environment variable.
///
/// The first launcher with a rank and a size wins, in the order torchrun, Open MPI, MPICH, MVAPICH, Slurm. Where both
/// `RANK` and an MPI launcher's variables are set and agree, the MPI launcher is named, because it can connect the ranks.
///
/// # Errors
/// [`Error::Launch`]: a rank without a size or the reverse, a number that is none, a rank outside its world, or two
/// launchers that disagree.
pub fn detect(lookup: impl Fn(&str) -> Option<String>) -> Result<Launcher> {
    let mut found: Option<Launcher> = None;
    for names in &LAUNCHERS {
        let Some(launcher) = read(names, &lookup)? else { continue };
        match found {
            None => found = Some(launcher),
            Some(first) if first.kind == LauncherKind::Torch && launcher.kind != LauncherKind::Slurm => {
                if (first.rank, first.world) == (launcher.rank, launcher.world) {
                    return Ok(launcher);
                }
                return Err(Error::Launch(format!(
                    "RANK={} WORLD_SIZE={} disagree with {}, which says rank {} of {}; unset RANK and WORLD_SIZE",
                    first.rank, first.world, launcher.kind, launcher.rank, launcher.world
                )));
            }
            Some(_) => break,
        }
    }
    Ok(found.unwrap_or(Launcher::SINGLE))
}

fn read(names: &Names, lookup: &impl Fn(&str) -> Option<String>) -> Result<Option<Launcher>> {
    let number = |name: &str| -> Result<Option<usize>> {
        let Some(text) = lookup(name).filter(|text| !text.is_empty()) else { return Ok(None) };
        let bad = |_| Error::Launch(format!("the environment variable {name} is {text:?}, not a number"));
        text.trim().parse().map(Some).map_err(bad)
    };
    let (rank, world) = match (number(names.rank)?, number(names.world)?) {
        (None, None) => return Ok(None),
        (Some(rank), Some(world)) => (rank, world),
        // srun sets its rank and an sbatch script has one too: only the size of a step tells them apart.
        (Some(_), None) if names.kind == LauncherKind::Slurm => return Ok(None),
        (Some(_), None) => {
            return Err(Error::Launch(format!(
                "{} is set but {} is not; set both or neither",
                names.rank, names.world
            )));
        }
        (None, Some(_)) => {
            return Err(Error::Launch(format!(
                "{} is set but {} is not; set both or neither",
                names.world, names.rank
            )));
        }
    };
    if names.kind == LauncherKind::Slurm && world <= 1 {
        return Ok(None);
    }
    if rank >= world {
        let (a, b) = (names.rank, names.world);
        return Err(Error::Launch(format!("{a}={rank} does not exist in a world of {b}={world}")));
    }
    let first = |choices: &[&str], otherwise: usize| -> Result<usize> {
        for name in choices {
            if let Some(value) = number(name)? {
                return Ok(value);
            }
        }
        Ok(otherwise)
    };
    let local_rank = first(names.local_rank, 0)?;
    let local_world = first(names.local_world, 1)?.max(local_rank + 1);
    Ok(Some(Launcher { kind: names.kind, rank, world, local_rank, local_world }))
}

/// How the ranks of this run meet.
#[derive(Debug)]
pub enum Connected {
    /// One process: the caller starts this many threads, each with its own communicator
    /// ([`Threads`](crate::Threads)).
    Threads {
        /// The number of ranks, at least 2.
        ranks: usize,
    },
    /// This process is one rank, and here is its communicator.
    Process {
        /// The world.
        world: Arc<dyn Collective>,
        /// What the launcher said.
        launcher: Launcher,
    },
}

/// Connects this process to its peers, from its environment.
///
/// `threads_ranks` is what the user asked for in so many words (`--ranks N`): N ranks in this one process. Without it a
/// process that an MPI launcher started joins the world of MPI, and any other is a world of one ([`Solo`]). `deadline`
/// bounds every later call.
///
/// # Errors
/// [`Error::Launch`]: as [`detect`]; `--ranks` under a launcher; a launcher whose ranks cannot be connected by this
/// binary (torchrun has no MPI, or the cargo feature `mpi` is off); and what connecting to MPI itself answers.
pub fn connect(deadline: Duration, threads_ranks: Option<usize>) -> Result<Connected> {
    let launcher = detect(|name| std::env::var(name).ok())?;
    match plan(launcher, threads_ranks, cfg!(feature = "mpi"))? {
        Choice::Threads(ranks) => Ok(Connected::Threads { ranks }),
        Choice::Solo => Ok(Connected::Process { world: Arc::new(Solo::new()), launcher }),
        Choice::Mpi => Ok(Connected::Process { world: over_mpi(deadline)?, launcher }),
    }
}

#[cfg(feature = "mpi")]
fn over_mpi(deadline: Duration) -> Result<Arc<dyn Collective>> {
    crate::mpi::Mpi::connect(deadline)
}

#[cfg(not(feature = "mpi"))]
fn over_mpi(_deadline: Duration) -> Result<Arc<dyn Collective>> {
    Err(Error::Launch("this binary was built without the cargo feature `mpi`".into()))
}

#[derive(Debug, PartialEq, Eq)]
enum Choice {
    Solo,
    Threads(usize),
    Mpi,
}

fn plan(launcher: Launcher, threads_ranks: Option<usize>, has_mpi: bool) -> Result<Choice> {
    let Launcher { kind, world, .. } = launcher;
    match threads_ranks {
        Some(0) => return Err(Error::Launch("0 ranks were asked for; the least is 1".into())),
        Some(ranks) if world > 1 => {
            return Err(Error::Launch(format!(
                "{ranks} ranks in one process were asked for, but {kind} has started {world} processes; \
                 use one of the two"
            )));
        }
        Some(1) => return Ok(Choice::Solo),
        Some(ranks) => return Ok(Choice::Threads(ranks)),
        None => {}
    }
    if kind == LauncherKind::Torch && world > 1 {
        return Err(Error::Launch(format!(
            "RANK and WORLD_SIZE are set ({kind} with {world} ranks), but these ranks have no way to meet: \
             start them with `mpirun -n {world}` or `srun --ntasks {world}` and a build with the cargo feature `mpi`"
        )));
    }
    if kind.is_mpi() && !has_mpi {
        if world == 1 {
            return Ok(Choice::Solo);
        }
        return Err(Error::Launch(format!(
            "{kind} has started {world} ranks, but this binary was built without the cargo feature `mpi`; \
             build with `--features mpi`, or use `--ranks {world}` without a launcher"
        )));
    }
    Ok(if kind.is_mpi() { Choice::Mpi } else { Choice::Solo })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(pairs: &[(&str, &str)]) -> Result<Launcher> {
        detect(|name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()))
    }

    fn refused(pairs: &[(&str, &str)]) -> String {
        from(pairs).unwrap_err().to_string()
    }

    #[test]
    fn every_launcher_is_read() {
        let cases: [(&[(&str, &str)], LauncherKind); 5] = [
            (&[("RANK", "1"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1"), ("LOCAL_SIZE", "2")], LauncherKind::Torch),
            (
                &[
                    ("OMPI_COMM_WORLD_RANK", "1"),
                    ("OMPI_COMM_WORLD_SIZE", "4"),
                    ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
                    ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
                ],
                LauncherKind::OpenMpi,
            ),
            (
                &[("PMI_RANK", "1"), ("PMI_SIZE", "4"), ("MPI_LOCALRANKID", "1"), ("MPI_LOCALNRANKS", "2")],
                LauncherKind::Hydra,
            ),
            (
                &[
                    ("MV2_COMM_WORLD_RANK", "1"),
                    ("MV2_COMM_WORLD_SIZE", "4"),
                    ("MV2_COMM_WORLD_LOCAL_RANK", "1"),
                    ("MV2_COMM_WORLD_LOCAL_SIZE", "2"),
                ],
                LauncherKind::Mvapich,
            ),
            (&[("SLURM_PROCID", "1"), ("SLURM_STEP_NUM_TASKS", "4"), ("SLURM_LOCALID", "1")], LauncherKind::Slurm),
        ];
        for (pairs, kind) in cases {
            let launcher = from(pairs).unwrap();
            assert_eq!(launcher, Launcher { kind, rank: 1, world: 4, local_rank: 1, local_world: 2 }, "{pairs:?}");
        }
        assert_eq!(from(&[]).unwrap(), Launcher::SINGLE);
        assert_eq!(from(&[("RANK", ""), ("WORLD_SIZE", "")]).unwrap(), Launcher::SINGLE);
    }

    #[test]
    fn the_first_complete_set_wins() {
        let both = [("PMI_RANK", "0"), ("PMI_SIZE", "2"), ("SLURM_PROCID", "5"), ("SLURM_STEP_NUM_TASKS", "8")];
        assert_eq!(from(&both).unwrap().kind, LauncherKind::Hydra);
        let mpi = [("RANK", "1"), ("WORLD_SIZE", "2"), ("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "2")];
        assert_eq!(from(&mpi).unwrap().kind, LauncherKind::OpenMpi);
        let apart = [("RANK", "0"), ("WORLD_SIZE", "2"), ("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "2")];
        assert!(refused(&apart).contains("disagree with Open MPI's mpirun"), "{}", refused(&apart));
        // torchrun on each node of a Slurm allocation: Slurm counts nodes there, not ranks.
        let torch = [("RANK", "3"), ("WORLD_SIZE", "4"), ("SLURM_PROCID", "1"), ("SLURM_STEP_NUM_TASKS", "2")];
        assert_eq!(from(&torch).unwrap().kind, LauncherKind::Torch);
    }

    #[test]
    fn half_a_set_is_an_error_except_in_a_batch_script() {
        assert_eq!(
            refused(&[("OMPI_COMM_WORLD_RANK", "1")]),
            "launch: OMPI_COMM_WORLD_RANK is set but OMPI_COMM_WORLD_SIZE is not; set both or neither"
        );
        assert!(refused(&[("WORLD_SIZE", "2")]).contains("WORLD_SIZE is set but RANK is not"));
        assert_eq!(from(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4")]).unwrap(), Launcher::SINGLE);
        assert_eq!(from(&[("SLURM_PROCID", "0"), ("SLURM_STEP_NUM_TASKS", "1")]).unwrap(), Launcher::SINGLE);
    }

    #[test]
    fn nonsense_is_named() {
        assert!(refused(&[("RANK", "one"), ("WORLD_SIZE", "2")]).contains("RANK is \"one\", not a number"));
        assert!(refused(&[("PMI_RANK", "2"), ("PMI_SIZE", "2")]).contains("PMI_RANK=2 does not exist"));
        assert!(refused(&[("PMI_RANK", "-1"), ("PMI_SIZE", "2")]).contains("not a number"));
    }

    #[test]
    fn what_cannot_connect_says_what_to_do() {
        let of = |kind, world| Launcher { kind, rank: 0, world, local_rank: 0, local_world: world };
        let refused = |launcher, ranks, mpi| plan(launcher, ranks, mpi).unwrap_err().to_string();
        assert_eq!(plan(of(LauncherKind::Single, 1), None, true).unwrap(), Choice::Solo);
        assert_eq!(plan(of(LauncherKind::Single, 1), Some(1), false).unwrap(), Choice::Solo);
        assert_eq!(plan(of(LauncherKind::Single, 1), Some(4), false).unwrap(), Choice::Threads(4));
        assert_eq!(plan(of(LauncherKind::OpenMpi, 2), None, true).unwrap(), Choice::Mpi);
        assert_eq!(plan(of(LauncherKind::OpenMpi, 1), None, false).unwrap(), Choice::Solo);
        assert_eq!(plan(of(LauncherKind::Torch, 1), None, false).unwrap(), Choice::Solo);
        assert!(refused(of(LauncherKind::OpenMpi, 2), None, false).contains("--features mpi"));
        let torch = refused(of(LauncherKind::Torch, 2), None, true);
        assert!(torch.contains("mpirun -n 2") && torch.contains("srun"), "{torch}");
        assert!(refused(of(LauncherKind::Hydra, 2), Some(3), true).contains("use one of the two"));
        assert!(refused(of(LauncherKind::Single, 1), Some(0), true).contains("the least is 1"));
    }
}
