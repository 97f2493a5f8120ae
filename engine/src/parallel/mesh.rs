//! How ranks share the work: data × tensor × pipeline.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tandem_collective::Collective;

use super::Group;
use super::slice::Offload;
use crate::model::unit::Cut;
use crate::precision::{Precision, WeightFormat};
use crate::{Error, Result};

/// Sizes of the three ways to share work.
///
/// Tensor-parallel ranks are neighbours, for they talk most; then come data-parallel ranks; pipeline stages are farthest
/// apart (the order of Megatron-LM: Narayanan et al., 2021, section 3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mesh {
    /// Ranks that compute different rows with the same weights.
    pub data: usize,
    /// Ranks that share every block.
    pub tensor: usize,
    /// Ranks that hold different blocks.
    pub pipeline: usize,
}

/// A rank's place in a mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Coordinates {
    /// Among the data-parallel ranks.
    pub data: usize,
    /// Among the tensor-parallel ranks.
    pub tensor: usize,
    /// Pipeline stage.
    pub pipeline: usize,
}

impl Mesh {
    /// One rank.
    pub const SOLO: Mesh = Mesh { data: 1, tensor: 1, pipeline: 1 };

    /// The mesh of `world` ranks of which `tensor × pipeline` make one model.
    ///
    /// # Errors
    /// [`Error::Mesh`] if they do not divide the world.
    pub fn new(world: usize, tensor: usize, pipeline: usize) -> Result<Self> {
        let model = tensor * pipeline;
        if model == 0 || world == 0 || !world.is_multiple_of(model) {
            return Err(Error::Mesh(format!(
                "{world} ranks cannot be shared among groups of {tensor} tensor-parallel × {pipeline} pipeline ranks; start \
                 a multiple of {model} ranks, or change parallel.tensor and parallel.pipeline"
            )));
        }
        Ok(Self { data: world / model, tensor, pipeline })
    }

    /// Number of ranks.
    pub fn world(&self) -> usize {
        self.data * self.tensor * self.pipeline
    }

    /// The place of `rank`.
    pub fn coordinates(&self, rank: usize) -> Coordinates {
        Coordinates {
            tensor: rank % self.tensor,
            data: rank / self.tensor % self.data,
            pipeline: rank / (self.tensor * self.data),
        }
    }

    /// The rank at a place.
    pub fn rank(&self, at: Coordinates) -> usize {
        (at.pipeline * self.data + at.data) * self.tensor + at.tensor
    }
}

/// How ranks share the work, and in which order they add.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParallelConfig {
    /// Tensor-parallel ranks in training.
    pub tensor: usize,
    /// Pipeline stages in training.
    pub pipeline: usize,
    /// Parts of a step whose gradients are added in a fixed tree; 0: as many as there are data-parallel ranks.
    pub data_lanes: usize,
    /// Pieces that blocks and vocabulary are cut into; 0: as many as the larger tensor-parallel group has ranks.
    pub tensor_lanes: usize,
    /// Tensor-parallel ranks in generation.
    pub inference_tensor: usize,
}

impl Default for ParallelConfig {
    fn default() -> Self {
        Self { tensor: 1, pipeline: 1, data_lanes: 0, tensor_lanes: 0, inference_tensor: 1 }
    }
}

/// One rank's place among all: its groups, and the order of sums that all keep.
#[derive(Debug)]
pub struct Parallel {
    /// The mesh of training.
    pub mesh: Mesh,
    /// This rank's place in it.
    pub at: Coordinates,
    /// All ranks.
    pub world: Arc<Group>,
    /// Ranks with the same part of the model.
    pub data: Arc<Group>,
    /// Ranks that share this rank's blocks.
    pub tensor: Arc<Group>,
    /// The stages of this rank's pipeline.
    pub pipeline: Arc<Group>,
    /// Ranks that generate together.
    pub inference: Arc<Group>,
    /// Parts of a step, a multiple of the data-parallel ranks.
    pub data_lanes: usize,
    /// Pieces of the model.
    pub tensor_lanes: usize,
}

impl Parallel {
    /// One rank alone, everything in one piece.
    pub fn solo() -> Arc<Self> {
        Arc::new(Self {
            mesh: Mesh::SOLO,
            at: Coordinates { data: 0, tensor: 0, pipeline: 0 },
            world: Arc::new(Group::solo()),
            data: Arc::new(Group::solo()),
            tensor: Arc::new(Group::solo()),
            pipeline: Arc::new(Group::solo()),
            inference: Arc::new(Group::solo()),
            data_lanes: 1,
            tensor_lanes: 1,
        })
    }

    /// Takes this rank's place in `world`. All ranks call it together.
    ///
    /// # Errors
    /// If the sizes do not fit, or ranks have lost each other.
    pub fn new(world: &Arc<dyn Collective>, config: &ParallelConfig) -> Result<Arc<Self>> {
        let all = Arc::new(Group::new(world.clone()));
        let mesh = Mesh::new(all.size(), config.tensor, config.pipeline)?;
        let at = mesh.coordinates(all.rank());
        let inference = config.inference_tensor;
        if inference == 0 || !all.size().is_multiple_of(inference) {
            return Err(Error::Mesh(format!(
                "{} ranks cannot generate in groups of ppo.inference_tp_size = {inference}; take a divisor of the ranks",
                all.size()
            )));
        }
        let tensor_lanes = match config.tensor_lanes {
            0 => config.tensor.max(inference),
            lanes => lanes,
        };
        Cut::share(tensor_lanes, config.tensor, 0)?;
        Cut::share(tensor_lanes, inference, 0)?;
        let data_lanes = match config.data_lanes {
            0 => mesh.data,
            lanes => lanes,
        };
        if !data_lanes.is_multiple_of(mesh.data) || !(data_lanes / mesh.data).is_power_of_two() {
            return Err(Error::Mesh(format!(
                "parallel.data_lanes = {data_lanes} must be {} data-parallel ranks times a power of two; its order of sums \
                 cannot be kept otherwise",
                mesh.data
            )));
        }
        let group = |color: usize| -> Result<Arc<Group>> {
            let part = match all.is_solo() {
                true => None,
                false => all.world().split(all.tag("split"), Some(color), all.rank())?,
            };
            Ok(Arc::new(part.map_or_else(Group::solo, Group::new)))
        };
        let data = group(at.pipeline * mesh.tensor + at.tensor)?;
        let tensor = group(at.pipeline * mesh.data + at.data)?;
        let pipeline = group(at.data * mesh.tensor + at.tensor)?;
        let inference = group(all.rank() / inference)?;
        Ok(Arc::new(Self { mesh, at, world: all, data, tensor, pipeline, inference, data_lanes, tensor_lanes }))
    }

    /// The place of a model that `whole` generates with: nothing is shared but the tensor-parallel pieces.
    pub(crate) fn generating(whole: &Self) -> Self {
        let solo = || Arc::new(Group::solo());
        Self {
            mesh: Mesh::SOLO,
            at: Coordinates { data: 0, tensor: 0, pipeline: 0 },
            world: solo(),
            data: solo(),
            tensor: whole.inference.clone(),
            pipeline: solo(),
            inference: whole.inference.clone(),
            data_lanes: 1,
            tensor_lanes: whole.tensor_lanes,
        }
    }

    /// What this rank computes of every unit in training.
    ///
    /// # Errors
    /// None that [`Self::new`] has not found.
    pub fn cut(&self) -> Result<Cut> {
        Cut::share(self.tensor_lanes, self.mesh.tensor, self.at.tensor)
    }

    /// What this rank computes of every unit in generation.
    ///
    /// # Errors
    /// None that [`Self::new`] has not found.
    pub fn inference_cut(&self) -> Result<Cut> {
        Cut::share(self.tensor_lanes, self.inference.size(), self.inference.rank())
    }

    /// The lanes of a step that this rank computes, in order.
    pub fn lanes(&self) -> impl Iterator<Item = usize> + use<> {
        (self.at.data..self.data_lanes).step_by(self.mesh.data)
    }

    /// Whether this rank runs the first blocks.
    pub fn is_first_stage(&self) -> bool {
        self.at.pipeline == 0
    }

    /// Whether this rank runs the head.
    pub fn is_last_stage(&self) -> bool {
        self.at.pipeline + 1 == self.mesh.pipeline
    }
}

/// What stays sliced between steps (Rajbhandari et al., 2020, "ZeRO", section 5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub enum ZeroStage {
    /// Nothing.
    #[default]
    Zero,
    /// Optimizer state.
    One,
    /// Optimizer state and gradients.
    Two,
    /// Optimizer state, gradients and weights.
    Three,
}

impl TryFrom<u8> for ZeroStage {
    type Error = String;
    fn try_from(stage: u8) -> std::result::Result<Self, String> {
        match stage {
            0 => Ok(Self::Zero),
            1 => Ok(Self::One),
            2 => Ok(Self::Two),
            3 => Ok(Self::Three),
            _ => Err(format!("there is no ZeRO stage {stage}; take 0, 1, 2 or 3")),
        }
    }
}

impl From<ZeroStage> for u8 {
    fn from(stage: ZeroStage) -> u8 {
        stage as u8
    }
}

/// Where one model's numbers are kept.
#[derive(Clone, Debug)]
pub struct Placement {
    /// This rank's place.
    pub parallel: Arc<Parallel>,
    /// What passes compute in.
    pub precision: Precision,
    /// Whether the weights are never trained, so that whole ones are kept in `precision` only.
    pub is_frozen: bool,
    /// What the linear maps of weights that are never trained are kept in.
    pub weights: WeightFormat,
    /// What stays sliced.
    pub stage: ZeroStage,
    /// Units of up to this many elements are kept whole in stage 3.
    pub persistence_threshold: usize,
    /// Units that are gathered ahead in stage 3.
    pub prefetch_units: usize,
    /// Gradients that may be on their way at once, bytes.
    pub reduce_bucket_bytes: usize,
    /// What is kept in files.
    pub offload: Offload,
    /// Where those files are.
    pub offload_dir: Option<PathBuf>,
}

impl Placement {
    /// One rank alone.
    pub fn solo() -> Self {
        Self::of(Parallel::solo(), ZeroStage::Zero)
    }

    /// A place with the usual knobs.
    pub fn of(parallel: Arc<Parallel>, stage: ZeroStage) -> Self {
        Self {
            parallel,
            precision: Precision::F32,
            is_frozen: false,
            weights: WeightFormat::Precision,
            stage,
            persistence_threshold: 0,
            prefetch_units: 1,
            reduce_bucket_bytes: 64 << 20,
            offload: Offload::None,
            offload_dir: None,
        }
    }

    /// Where weights are kept in files, if they are.
    pub(super) fn weights_dir(&self) -> Option<&Path> {
        self.offload_dir.as_deref().filter(|_| self.offload == Offload::All)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensor_ranks_are_neighbours_and_every_rank_has_one_place() {
        let mesh = Mesh::new(12, 2, 3).unwrap();
        assert_eq!(mesh.data, 2);
        for rank in 0..12 {
            assert_eq!(mesh.rank(mesh.coordinates(rank)), rank);
        }
        assert_eq!(mesh.coordinates(1), Coordinates { data: 0, tensor: 1, pipeline: 0 });
        assert_eq!(mesh.coordinates(2), Coordinates { data: 1, tensor: 0, pipeline: 0 });
        assert_eq!(mesh.coordinates(4).pipeline, 1);
        assert!(Mesh::new(6, 4, 1).unwrap_err().to_string().contains("a multiple of 4 ranks"));
    }
}
