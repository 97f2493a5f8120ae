//! `[parallel]`: how the ranks of a run share its work, and the sums that must come out even.

use serde::{Deserialize, Serialize};
use tandem_engine::parallel::Mesh;

use super::check::Checker;
use super::error::{ConfigError, Origin};
use super::{Config, Stage};

const DATA_LANES: &str = "parallel.data_lanes";
const TENSOR_LANES: &str = "parallel.tensor_lanes";
/// Longer than any run lasts, in seconds; far longer times could not be added to a clock.
const MAX_TIMEOUT_S: f64 = 1e9;

/// `[parallel]`. Where a number is computed may change from one start of a run to the next; in which order numbers are
/// added up may not, so the two `*_lanes` belong to a run for good.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ParallelConfig {
    /// Ranks that share each linear map while training (tensor parallelism).
    pub tensor: usize,
    /// Ranks that share the blocks, one after the other (pipeline parallelism).
    pub pipeline: usize,
    /// Parts into which the rows of a step are cut; their gradients are added along a fixed binary tree. A data-parallel
    /// size must be this divided by a power of two, and all such sizes give the same bits. 0: the data-parallel size when the run
    /// begins.
    pub data_lanes: usize,
    /// Parts into which the sums inside linear maps are cut, likewise. 0: the larger of `parallel.tensor` and
    /// `ppo.inference_tp_size` when the run begins.
    pub tensor_lanes: usize,
    /// How long a rank waits for the others, in seconds. It must be longer than what one rank does while the others wait:
    /// writing a checkpoint, for example.
    pub timeout_s: f64,
    /// Units gathered ahead of the one that computes, where weights are sharded (`zero_stage = 3`).
    pub prefetch_units: usize,
    /// Gradients are reduced in portions of this many MiB.
    pub reduce_bucket_mib: u64,
    /// Units with at most this many elements are never sharded (`zero_stage = 3`): they cost little to keep and much to
    /// gather; 0: none.
    pub persistence_threshold: usize,
    /// Whether sums and gathers go through each node first and only then between nodes.
    pub hierarchical: bool,
}

impl Default for ParallelConfig {
    fn default() -> Self {
        Self {
            tensor: 1,
            pipeline: 1,
            data_lanes: 0,
            tensor_lanes: 0,
            timeout_s: 600.0,
            prefetch_units: 1,
            reduce_bucket_mib: 64,
            persistence_threshold: 0,
            hierarchical: false,
        }
    }
}

/// In how many parts sums are taken, whatever the number of ranks: a property of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lanes {
    /// Parts of the rows of a step.
    pub data: usize,
    /// Parts of the sums inside linear maps.
    pub tensor: usize,
}

impl ParallelConfig {
    pub(super) fn check(&self, check: &mut Checker) {
        check.at_least("parallel.tensor", self.tensor, 1);
        check.at_least("parallel.pipeline", self.pipeline, 1);
        if self.timeout_s > MAX_TIMEOUT_S {
            let problem = format_args!("is {}; it must be at most {MAX_TIMEOUT_S}", self.timeout_s);
            check.fail("parallel.timeout_s", problem);
        } else {
            check.positive("parallel.timeout_s", self.timeout_s);
        }
        check.at_least("parallel.reduce_bucket_mib", self.reduce_bucket_mib, 1);
        if self.tensor_lanes > 0 && self.tensor > 0 && !self.tensor_lanes.is_multiple_of(self.tensor) {
            check.fail(
                "parallel.tensor_lanes",
                format_args!("is {}, which parallel.tensor = {} does not divide", self.tensor_lanes, self.tensor),
            );
        }
    }
}

impl ParallelConfig {
    /// The lanes that are given, and those of `known` where none are.
    pub(crate) fn lanes_after(&self, known: Lanes) -> Lanes {
        let or = |given: usize, known: usize| if given == 0 { known } else { given };
        Lanes { data: or(self.data_lanes, known.data), tensor: or(self.tensor_lanes, known.tensor) }
    }
}

impl Config {
    /// The mesh of a world of `ranks`, if `stages` can run on it.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] with all that does not come out even; `origin` is where the configuration came from.
    pub fn mesh(&self, ranks: usize, stages: &[Stage], origin: &Origin) -> Result<Mesh, ConfigError> {
        let ParallelConfig { tensor, pipeline, .. } = self.parallel;
        let mut check = Checker::default();
        let model = tensor.max(1) * pipeline.max(1);
        if !ranks.is_multiple_of(model) || ranks == 0 {
            let problem = format_args!(
                "= {tensor} and `parallel.pipeline` = {pipeline} need a multiple of {model} ranks, not {ranks}; start \
                 {} ranks or change the two",
                ranks.next_multiple_of(model).max(model)
            );
            check.fail("parallel.tensor", problem);
        } else {
            check_lanes(DATA_LANES, self.parallel.data_lanes, ranks / model, &mut check);
        }
        if stages.contains(&Stage::Ppo) {
            let generating = self.ppo.inference_tp_size;
            if generating > 0 && !ranks.is_multiple_of(generating) {
                let problem = format_args!(
                    "is {generating}, which does not divide the {ranks} ranks; take a divisor of {ranks} or start {} ranks",
                    ranks.next_multiple_of(generating)
                );
                check.fail("ppo.inference_tp_size", problem);
            }
            let lanes = self.parallel.tensor_lanes;
            let lanes = if lanes == 0 { tensor.max(generating) } else { lanes };
            check_lanes(TENSOR_LANES, lanes, tensor, &mut check);
            check_lanes(TENSOR_LANES, lanes, generating, &mut check);
        }
        let problems = check.into_problems();
        if !problems.is_empty() {
            return Err(ConfigError::Invalid { origin: origin.clone(), problems });
        }
        Ok(Mesh { data: ranks / model, tensor, pipeline })
    }

    /// The lanes of a run of `stage` that begins on `mesh`.
    pub fn lanes(&self, mesh: Mesh, stage: Stage) -> Lanes {
        self.parallel.lanes_after(Lanes { data: mesh.data, tensor: mesh.tensor.max(self.generating(stage)) })
    }

    /// Ranks that share a copy of the model that generates in `stage`.
    pub fn generating(&self, stage: Stage) -> usize {
        if stage == Stage::Ppo { self.ppo.inference_tp_size } else { 1 }
    }
}

impl Lanes {
    /// Whether a run with these lanes can go on upon `mesh`, `generating` ranks sharing each replica that generates.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] naming the numbers that do not come out even and what to do.
    pub fn check(self, mesh: Mesh, generating: usize) -> Result<(), ConfigError> {
        let mut check = Checker::default();
        check_lanes(DATA_LANES, self.data, mesh.data, &mut check);
        check_lanes(TENSOR_LANES, self.tensor, mesh.tensor, &mut check);
        check_lanes(TENSOR_LANES, self.tensor, generating, &mut check);
        match check.into_problems() {
            problems if problems.is_empty() => Ok(()),
            problems => Err(ConfigError::Invalid { origin: Origin::Defaults, problems }),
        }
    }
}

/// Each rank along an axis works on the same number of lanes (0: one); of rows, a power of two of them, so that a rank's own
/// sums are a branch of the tree.
fn check_lanes(key: &str, lanes: usize, ranks: usize, check: &mut Checker) {
    if lanes == 0 || ranks == 0 {
        return;
    }
    let (axis, more) = match key {
        DATA_LANES => ("data-parallel", " times a power of two"),
        _ => ("tensor-parallel", ", or a multiple of them"),
    };
    if lanes.is_multiple_of(ranks) && (key != DATA_LANES || (lanes / ranks).is_power_of_two()) {
        return;
    }
    let problem = format_args!(
        "is {lanes}, but {ranks} {axis} ranks can only share {ranks} lanes{more}; start with a number of ranks that fits \
         {lanes} lanes, or begin a new run with lanes that fit the ranks"
    );
    check.fail(key, problem);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Config {
        Config::parse(text, &Origin::Defaults, &[]).unwrap()
    }

    fn problems(config: &Config, ranks: usize) -> Vec<String> {
        match config.mesh(ranks, &Stage::ALL, &Origin::Defaults) {
            Err(ConfigError::Invalid { problems, .. }) => problems,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_mesh_is_what_is_left_over() {
        let plan = config("parallel = { tensor = 4, pipeline = 2 }");
        let mesh = plan.mesh(64, &Stage::ALL, &Origin::Defaults).unwrap();
        assert_eq!(mesh, Mesh { data: 8, tensor: 4, pipeline: 2 });
        assert_eq!(mesh.world(), 64);
        let found = problems(&plan, 12);
        assert!(found.len() == 1 && found[0].contains("multiple of 8 ranks, not 12"), "{found:?}");
        assert!(found[0].contains("start 16 ranks"), "{found:?}");
    }

    #[test]
    fn lanes_are_shared_evenly() {
        let plan = config("parallel.data_lanes = 4\nppo.inference_tp_size = 3");
        let found = problems(&plan, 8);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("is 4") && found[0].contains("8 data-parallel ranks"), "{found:?}");
        assert!(found[1].contains("`ppo.inference_tp_size` is 3") && found[1].contains("the 8 ranks"), "{found:?}");
        // The other stages do not generate.
        assert!(config("ppo.inference_tp_size = 3").mesh(8, &[Stage::Sft], &Origin::Defaults).is_ok());
    }

    #[test]
    fn lanes_left_out_are_those_of_the_first_start() {
        let plan = config("parallel.tensor = 2\nppo.inference_tp_size = 4");
        let mesh = plan.mesh(8, &Stage::ALL, &Origin::Defaults).unwrap();
        assert_eq!(plan.lanes(mesh, Stage::Sft), Lanes { data: 4, tensor: 2 });
        let lanes = plan.lanes(mesh, Stage::Ppo);
        assert_eq!(lanes, Lanes { data: 4, tensor: 4 });
        let given = config("parallel = { data_lanes = 8, tensor_lanes = 8 }");
        assert_eq!(given.lanes(mesh, Stage::Ppo), Lanes { data: 8, tensor: 8 });

        lanes.check(Mesh { data: 2, tensor: 1, pipeline: 3 }, 2).unwrap();
        // Three lanes of a rank would be no branch of a binary tree.
        assert!(Lanes { data: 6, tensor: 1 }.check(Mesh { data: 2, tensor: 1, pipeline: 1 }, 1).is_err());
        assert!(Lanes { data: 6, tensor: 1 }.check(Mesh { data: 3, tensor: 1, pipeline: 1 }, 1).is_ok());
        let error = lanes.check(Mesh { data: 3, tensor: 1, pipeline: 1 }, 1).unwrap_err().to_string();
        assert!(error.contains("`parallel.data_lanes` is 4") && error.contains("3 data-parallel ranks"), "{error}");
        let error = lanes.check(Mesh { data: 4, tensor: 1, pipeline: 1 }, 8).unwrap_err().to_string();
        assert!(error.contains("`parallel.tensor_lanes` is 4") && error.contains("8 tensor-parallel"), "{error}");
    }
}
