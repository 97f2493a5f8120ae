//! The golden vectors under `tests/golden/`: tiny models of every family and what `transformers` computes with them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use tandem_engine::model::Model;
use tandem_engine::model::export::{self, ExportOptions};
use tandem_engine::model::families::TensorMap;
use tandem_engine::model::import;
use tandem_engine::model::unit::{Head, UnitBuffer, UnitId};
use tandem_engine::{Packed, Result};
use tandem_store::RunDir;

/// The golden models with a language head.
pub const CAUSAL: [&str; 7] = ["llama", "llama-tied", "mistral", "qwen2", "gpt2", "opt", "opt-350m"];

/// The folder of a golden model.
pub fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(name)
}

/// A golden model.
pub fn model(name: &str, head: Head) -> Model {
    import::load(&folder(name), head).unwrap().into_model().unwrap().0
}

/// What `transformers` computed.
pub struct Vectors(HashMap<String, Tensor>);

impl Vectors {
    /// Reads a file of vectors.
    pub fn read(path: &Path) -> Self {
        Self(candle_core::safetensors::load(path, &Device::Cpu).unwrap())
    }

    /// The vectors of a golden model.
    pub fn of(name: &str) -> Self {
        Self::read(&folder(name).join("vectors.safetensors"))
    }

    /// Elements of a tensor of floats.
    pub fn floats(&self, name: &str) -> Vec<f32> {
        self.0[name].flatten_all().unwrap().to_vec1().unwrap()
    }

    /// Elements of a tensor of ids.
    pub fn ids(&self, name: &str) -> Vec<u32> {
        self.0[name].to_dtype(DType::U32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    /// The sequences, packed.
    pub fn batch(&self) -> Packed {
        let (ids, cuts) = (self.ids("input_ids"), self.ids("cu_seqlens"));
        Packed::from_sequences(cuts.windows(2).map(|cut| &ids[cut[0] as usize..cut[1] as usize]))
    }

    /// Names of the tensors that begin with `prefix`, without it, sorted.
    pub fn names(&self, prefix: &str) -> Vec<String> {
        let mut names: Vec<String> =
            self.0.keys().filter_map(|name| name.strip_prefix(prefix)).map(str::to_string).collect();
        names.sort();
        names
    }
}

/// Rows of a batch that predict a token, and the tokens they predict.
pub fn predictions(batch: &Packed) -> (Vec<u32>, Vec<u32>) {
    let rows = (0..batch.sequences()).flat_map(|sequence| {
        let rows = batch.rows(sequence);
        rows.start..rows.end.saturating_sub(1).max(rows.start)
    });
    rows.map(|row| (row as u32, batch.ids[row + 1])).unzip()
}

/// The last row of each sequence.
pub fn last_rows(batch: &Packed) -> Vec<u32> {
    batch.cu_seqlens[1..].iter().map(|end| end - 1).collect()
}

/// The part of a model's units that one tensor of its folder is, in the folder's order of elements.
pub fn in_file_order(units: &[UnitBuffer], map: &TensorMap) -> Vec<f32> {
    let unit = match map.unit {
        UnitId::Ends => &units[0],
        UnitId::Block(index) => &units[index + 1],
    };
    let rows = unit.get(map.param).unwrap().narrow(0, map.first_row, map.rows).unwrap();
    let rows = if map.transposed { rows.t().unwrap() } else { rows };
    assert_eq!(rows.dims(), map.shape, "{}", map.name);
    rows.contiguous().unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The bits of all weights, for comparisons that allow no difference.
pub fn bits(units: &[UnitBuffer]) -> Vec<Vec<u32>> {
    units.iter().map(|unit| floats(unit.flat()).into_iter().map(f32::to_bits).collect()).collect()
}

/// Elements of a tensor.
pub fn floats(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// The largest magnitude.
pub fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |largest, value| largest.max(value.abs()))
}

/// The largest difference.
pub fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |largest, (a, b)| {
        let difference = (a - b).abs();
        // A NaN must not pass for agreement.
        if difference.is_nan() { f32::INFINITY } else { largest.max(difference) }
    })
}

/// Fails if the largest difference is above 1e-4 of the largest magnitude wanted.
pub fn assert_close(what: &str, got: &[f32], wanted: &[f32]) {
    let (error, scale) = (difference(got, wanted), largest(wanted));
    assert!(error <= 1e-4 * scale, "{what}: off by {error:e}, largest magnitude {scale:e}");
}

/// Exports a loaded model into `root/export` and returns that folder.
///
/// # Errors
/// Those of the export.
pub fn export(root: &Path, loaded: &import::Loaded, options: &ExportOptions) -> Result<PathBuf> {
    let run = RunDir::open(root)?;
    let mut staging = run.stage_export()?;
    let model = Model::from_parts(loaded.spec.clone(), loaded.head, loaded.units.clone())?;
    export::write(&model, Some(&loaded.config), options, Some(&mut staging))?;
    staging.publish(serde_json::Value::Null)?;
    Ok(run.export_path())
}
