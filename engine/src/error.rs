//! What the engine can refuse, with the file, tensor or sequence concerned and the way out.

use std::path::{Path, PathBuf};

use crate::model::spec::Family;
use crate::model::unit::UnitId;

/// Result of the engine.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of the engine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Ranks have lost each other.
    #[error(transparent)]
    Collective(#[from] tandem_collective::Error),
    /// Adapters that cannot be, or cannot be put on this model.
    #[error("{0}")]
    Lora(String),
    /// The ranks cannot share the work so.
    #[error("{0}")]
    Mesh(String),
    /// An optimizer cannot train so.
    #[error("the optimizer \"{kind}\" cannot train so: {reason}")]
    Optimizer {
        /// Which one.
        kind: crate::train::OptimizerKind,
        /// Why, and what to do.
        reason: String,
    },
    /// Weights were to change while ranks still read them: a pass has failed half-way, or calls ran out of order.
    #[error("weights were to change while a pass still reads them; after a failed pass start again from a checkpoint")]
    WeightsInUse,
    /// A kernel refused its arguments.
    #[error(transparent)]
    Kernel(#[from] tandem_kernels::Error),
    /// The tensor library refused.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// The durable store refused.
    #[error(transparent)]
    Store(#[from] tandem_store::StoreError),
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A model file is not what it should be.
    #[error("{path}: {reason}; {remedy}")]
    ModelFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
        /// What to do.
        remedy: String,
    },
    /// The tensors of a model do not match its config.
    #[error("{path}: the tensors do not match the configuration{}", list(missing, unexpected, misshaped))]
    Tensors {
        /// The model.
        path: PathBuf,
        /// Needed but absent.
        missing: Vec<String>,
        /// Present but unknown.
        unexpected: Vec<String>,
        /// Present with another shape, with both shapes.
        misshaped: Vec<String>,
    },
    /// A family's files have no name for a parameter: the spec is not one of that family.
    #[error(
        "models of the family {family} have no {param}; take the family whose config.json can say what the spec says"
    )]
    NoName {
        /// The family.
        family: Family,
        /// The parameter.
        param: &'static str,
    },
    /// A spec that the config.json of its family cannot express.
    #[error(
        "a config.json of the family {family} cannot express this model: it would be read back with {what} changed"
    )]
    Inexpressible {
        /// The family.
        family: Family,
        /// The fields that would be lost.
        what: String,
    },
    /// A sequence is empty or longer than the model takes.
    #[error(
        "sequence {sequence} of the batch has {tokens} tokens; the model takes 1 to {limit}: shorten it or lower data.max_tokens"
    )]
    SequenceLength {
        /// Index in the batch.
        sequence: usize,
        /// Its tokens.
        tokens: usize,
        /// Most that the model takes.
        limit: usize,
    },
    /// A unit has no parameter of that name.
    #[error("unit {unit} has no parameter {name}")]
    NoParameter {
        /// The unit.
        unit: UnitId,
        /// The name asked for.
        name: String,
    },
    /// A weight that 8 bits cannot stand for.
    #[error(
        "row {row} of {name} in unit {unit} has the largest magnitude {value}, which no 8 bits stand for: the weights are \
         damaged, take others or repeat the training that they come from"
    )]
    Int8Weight {
        /// The unit.
        unit: UnitId,
        /// The parameter.
        name: &'static str,
        /// Its row.
        row: usize,
        /// The largest magnitude in it.
        value: f32,
    },
    /// Weights cannot be kept in 8 bits so.
    #[error("{0}")]
    Int8(String),
    /// A matrix that is kept in 8 bits was to be read or trained.
    #[error("{name} of unit {unit} is kept in 8 bits: it can be multiplied with, and not be trained or read otherwise")]
    KeptInt8 {
        /// The unit.
        unit: UnitId,
        /// The parameter.
        name: &'static str,
    },
    /// A flat buffer has another length than its layout.
    #[error("unit {unit}: its flat buffer must have {expected} elements, got {got}")]
    BufferLength {
        /// The unit.
        unit: UnitId,
        /// Elements of the layout.
        expected: usize,
        /// Elements given.
        got: usize,
    },
    /// A model got another number of units than its spec has.
    #[error("the model has {expected} units, got {got}")]
    UnitCount {
        /// Units of the spec.
        expected: usize,
        /// Units given.
        got: usize,
    },
    /// A switch to generation would throw gradients away.
    #[error("gradients are waiting for an optimizer step; call step() or clear_grads() before generating")]
    PendingGradients,
    /// A request to the generator cannot be met.
    #[error("request {request}: {reason}")]
    Request {
        /// Index of the request.
        request: usize,
        /// Why.
        reason: String,
    },
    /// A checkpoint does not fit the model it is loaded into.
    #[error("checkpoint {path}: {reason}")]
    Checkpoint {
        /// The checkpoint.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A number is not finite.
    #[error("step {step}: {what} is not finite{place}")]
    NotFinite {
        /// The optimizer step under way.
        step: u64,
        /// Which number.
        what: &'static str,
        /// Where, if known: ` in unit …`.
        place: String,
    },
}

impl Error {
    /// What a pipeline's last stage knows was asked of another one.
    pub(crate) fn not_last_stage() -> Self {
        Error::Mesh("only the last stage of a pipeline knows the loss; pass all micro-batches at once".into())
    }

    /// A [`Error::ModelFile`].
    pub(crate) fn model_file(path: &Path, reason: impl Into<String>, remedy: impl Into<String>) -> Self {
        Error::ModelFile { path: path.to_path_buf(), reason: reason.into(), remedy: remedy.into() }
    }

    /// A [`Error::Io`].
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Error::Io { path: path.to_path_buf(), source }
    }
}

fn list(missing: &[String], unexpected: &[String], misshaped: &[String]) -> String {
    let part = |title: &str, names: &[String]| match names {
        [] => String::new(),
        names => format!("\n  {title}: {}", names.join(", ")),
    };
    part("missing", missing) + &part("unexpected", unexpected) + &part("wrong shape", misshaped)
}
