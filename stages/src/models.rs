//! Models and tokenizers: how a stage gets them, and how it hands them on.

use std::fs;
use std::path::Path;

use candle_core::{Device, Tensor};
use serde_json::{Map, Value, json};
use tandem_data::hub::resolve_model;
use tandem_data::tokenizer::TokenizerFiles;
use tandem_data::{DataError, Tokenizer};
use tandem_engine::Model;
use tandem_engine::model::export::{self, ExportOptions, SpecialIds};
use tandem_engine::model::families::{self, RewardScale};
use tandem_engine::model::import::{self, Opened};
use tandem_engine::model::unit::{Head, SCORE, UnitId};
use tandem_engine::model::{Blueprint, gguf};
use tandem_kernels::rng::{Philox, Purpose};
use tandem_kernels::slice::with_slice;
use tandem_store::Staging;

use crate::config::{Config, DataConfig, ExportDtype, GenerationConfig, NewModelConfig};
use crate::dry_run::check_length;
use crate::error::Result;

/// `data.template` for plain text.
const NO_TEMPLATE: &str = "none";
/// Address of the scalar head's initial weights, away from those of the units.
const SCORE_ADDRESS: u64 = u64::MAX;
/// Elements digested at a time.
const CHUNK: usize = 1 << 14;

/// A model with all that belongs to it. Its weights are read when it takes its place on this rank.
#[derive(Debug)]
pub struct LoadedModel {
    /// The model.
    pub blueprint: Blueprint,
    /// Its tokenizer, whose ids all have an embedding.
    pub tokenizer: Tokenizer,
    /// The `config.json` it came with; `Null` for a model made from nothing.
    pub source_config: Value,
    /// Mean and spread of its scores, if it is a reward model that knows them.
    pub reward_scale: Option<RewardScale>,
    /// A scalar head was asked for and the model has none: it is zero.
    pub missing_score: bool,
}

/// Loads the model that `source` names (a Hugging Face folder, a GGUF file or a hub id), with its own tokenizer.
///
/// # Errors
/// Whatever is missing, damaged or does not fit together; the message names the file and the remedy.
pub fn load(source: &str, head: Head) -> Result<LoadedModel> {
    load_with(source, head, tokenizer_of)
}

/// As [`load`], with the chat template that the configuration names, if it names one; and, for the model in `[model]`, with
/// the tokenizer in `[tokenizer]`.
///
/// # Errors
/// As [`load`], and a template that cannot be read or does not compile.
pub fn load_for(config: &Config, source: &str, head: Head) -> Result<LoadedModel> {
    let own = config.tokenizer.path.as_deref().filter(|_| config.model.path.as_deref() == Some(source));
    load_with(source, head, |path| {
        let mut tokenizer = own.map_or_else(|| tokenizer_of(path), load_tokenizer)?;
        set_template(&mut tokenizer, &config.data)?;
        Ok(tokenizer)
    })
}

fn load_with(source: &str, head: Head, tokenizer: impl FnOnce(&Path) -> Result<Tokenizer>) -> Result<LoadedModel> {
    let path = resolve_model(source)?;
    let tokenizer = tokenizer(&path)?;
    let Opened { blueprint, config, reward_scale, missing_score } = import::open(&path, head)?;
    tokenizer.check_fits(blueprint.spec().vocab_size)?;
    Ok(LoadedModel { blueprint, tokenizer, source_config: config, reward_scale, missing_score })
}

/// A language model with random weights drawn from `seed`, for the vocabulary of `tokenizer`.
///
/// # Errors
/// A shape that no `config.json` can express.
pub fn initial(new: &NewModelConfig, tokenizer: Tokenizer, seed: u64) -> Result<LoadedModel> {
    let spec = new.spec(tokenizer.vocab_size());
    families::check_expressible(&spec)?;
    let blueprint = Blueprint::initial(spec, Head::Language, seed);
    Ok(LoadedModel { blueprint, tokenizer, source_config: Value::Null, reward_scale: None, missing_score: false })
}

impl LoadedModel {
    /// Draws a missing scalar head from a normal distribution of standard deviation `1/√(d + 1)`, `d` being its width
    /// (Stiennon et al., 2020, "Learning to summarize from human feedback", appendix B.1). A head that is there stays.
    ///
    /// A reward model must not start at zero: its score is bounded by the head's norm, which then has to grow first.
    pub fn init_score(self, seed: u64) -> Self {
        if !self.missing_score {
            return self;
        }
        let blueprint = self.blueprint.amended(UnitId::Ends, move |ends| {
            let Some(slot) = ends.layout().slot(SCORE) else { return Ok(()) };
            let mut values = vec![0f32; slot.len()];
            let std = 1.0 / ((slot.len() + 1) as f64).sqrt();
            Philox::new(seed, Purpose::Init, 0).fill_normal(SCORE_ADDRESS, 0, std, &mut values);
            let len = values.len();
            Ok(ends.flat().slice_set(&Tensor::from_vec(values, len, &Device::Cpu)?, 0, slot.offset)?)
        });
        Self { blueprint, missing_score: false, ..self }
    }

    /// The model with scores in the units of the rewards, which the spread of a reward model has scaled: what a critic made
    /// from one starts with.
    pub fn in_units_of_reward(self) -> Blueprint {
        let Some(scale) = self.reward_scale.filter(|scale| scale.std > 0.0) else { return self.blueprint };
        self.blueprint.amended(UnitId::Ends, move |ends| {
            let score = ends.get(SCORE)?;
            Ok(score.slice_set(&(&score / scale.std)?.contiguous()?, 0, 0)?)
        })
    }

    /// BLAKE3 over everything that decides what the model computes from a text (lower-case hex). Reads all weights once, and
    /// so finds what is wrong with them before anything is begun.
    ///
    /// # Errors
    /// If the weights cannot be read or one is not a finite number.
    pub fn digest(&self) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        hasher.update(format!("{:?} {:?}", self.blueprint.spec(), self.blueprint.head()).as_bytes());
        let mut bytes = Vec::with_capacity(4 * CHUNK);
        for unit in self.blueprint.units() {
            with_slice(unit?.flat(), |values| {
                for values in values.chunks(CHUNK) {
                    bytes.clear();
                    bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
                    hasher.update(&bytes);
                }
            })
            .map_err(tandem_engine::Error::from)?;
        }
        hasher.update(self.tokenizer.files().tokenizer());
        hasher.update(self.tokenizer.template().map_or("", |template| template.source()).as_bytes());
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// Refuses samples of a length that the model has no positions for.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`](crate::config::ConfigError), if `tokens`, which `key` says, are too many.
    pub fn check_length(&self, key: &str, tokens: usize) -> Result<()> {
        check_length(self.blueprint.spec(), key, tokens)
    }
}

/// Writes a model as a Hugging Face folder, on the rank that has somewhere to write to; all ranks bring their parts of it: weights, `config.json`, tokenizer files and, for language models,
/// `generation_config.json` with the tokens that end a response and the sampling of `[generation]`.
///
/// # Errors
/// A weight that is not finite, a family that cannot express the model, or an error of the file system.
pub fn export(
    model: &Model,
    tokenizer: &Tokenizer,
    source_config: &Value,
    reward_scale: Option<RewardScale>,
    config: &Config,
    staging: Option<&mut Staging>,
) -> Result<()> {
    let special = tokenizer.special();
    let options = ExportOptions {
        dtype: match config.export.dtype {
            ExportDtype::F32 => export::ExportDtype::F32,
            ExportDtype::Bf16 => export::ExportDtype::Bf16,
        },
        max_shard_bytes: config.export.max_shard_mib << 20,
        reward_scale,
        special_ids: SpecialIds {
            bos: special.bos,
            eos: special.stop.clone(),
            // transformers' reward models need one; the end of text is what no response holds inside.
            pad: special.pad.or((model.head() == Head::Scalar).then_some(special.eos)),
        },
        generation: generation_fields(&config.generation),
    };
    let original = (!source_config.is_null()).then_some(source_config);
    let Some(staging) = staging else { return Ok(export::write(model, original, &options, None)?) };
    export::write(model, original, &options, Some(&mut *staging))?;
    for (name, bytes) in tokenizer.files().iter() {
        staging.write(name, bytes)?;
    }
    Ok(())
}

/// `[generation]` in the keys of transformers.
fn generation_fields(generation: &GenerationConfig) -> Map<String, Value> {
    let sampling = &generation.sampling;
    let mut fields = Map::new();
    fields.insert("max_new_tokens".into(), json!(generation.max_new_tokens));
    fields.insert("do_sample".into(), json!(sampling.temperature > 0.0));
    if sampling.temperature > 0.0 {
        fields.insert("temperature".into(), json!(sampling.temperature));
        fields.insert("top_k".into(), json!(sampling.top_k));
        fields.insert("top_p".into(), json!(sampling.top_p));
        if sampling.min_p > 0.0 {
            fields.insert("min_p".into(), json!(sampling.min_p));
        }
    }
    fields.insert("repetition_penalty".into(), json!(sampling.repetition_penalty));
    fields
}

/// The tokenizer of a folder or hub id.
///
/// # Errors
/// Nothing of that name, or files that are missing or damaged.
pub fn load_tokenizer(source: &str) -> Result<Tokenizer> {
    let folder = Path::new(source);
    // A folder with a tokenizer need not hold a model.
    if folder.is_dir() { Ok(Tokenizer::load(folder)?) } else { tokenizer_of(&resolve_model(source)?) }
}

/// The tokenizer of the model folder or GGUF file `path`.
fn tokenizer_of(path: &Path) -> Result<Tokenizer> {
    if path.is_dir() {
        return Ok(Tokenizer::load(path)?);
    }
    let found = gguf::tokenizer(path)?;
    let files = TokenizerFiles::new(found.tokenizer.to_string().into_bytes()).with_config(&found.config);
    Ok(Tokenizer::from_files(path.display().to_string(), files)?)
}

/// Uses the chat template that `data` names, if it names one.
///
/// # Errors
/// The file cannot be read, or the template does not compile.
pub fn set_template(tokenizer: &mut Tokenizer, data: &DataConfig) -> Result<()> {
    match data.template.as_deref() {
        None => Ok(()),
        Some(NO_TEMPLATE) => Ok(tokenizer.set_template("data.template", None)?),
        Some(path) => {
            let source = fs::read_to_string(path).map_err(|source| DataError::Io { path: path.into(), source })?;
            Ok(tokenizer.set_template(path, Some(&source))?)
        }
    }
}
