//! A second opinion: candle's own Llama agrees on the logits of every position of every sequence.
//!
//! `cargo test --release -p tandem-tests --features oracle --test oracle`

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::llama::{Cache, Llama, LlamaConfig};
use tandem_engine::model::unit::Head;
use tandem_tests::golden::{Vectors, assert_close, floats, folder, model};

#[test]
fn candles_llama_agrees() {
    for name in ["llama", "llama-tied"] {
        let folder = folder(name);
        let device = Device::Cpu;
        let mut config: serde_json::Value =
            serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
        // It knows the keys of transformers 4 only.
        if let Some(theta) = config["rope_parameters"]["rope_theta"].as_f64() {
            config["rope_theta"] = theta.into();
        }
        let config: LlamaConfig = serde_json::from_value(config).unwrap();
        let config = config.into_config(false);
        let tensors = candle_core::safetensors::load(folder.join("model.safetensors"), &device).unwrap();
        let theirs = Llama::load(VarBuilder::from_tensors(tensors, DType::F32, &device), &config).unwrap();

        let batch = Vectors::of(name).batch();
        let ours = model(name, Head::Language).logits(&batch).unwrap();
        for sequence in 0..batch.sequences() {
            let rows = batch.rows(sequence);
            // It returns the logits of the last position only, so every prefix is a sequence of its own.
            for last in rows.clone() {
                let ids = Tensor::new(&batch.ids[rows.start..=last], &device).unwrap().unsqueeze(0).unwrap();
                let mut cache = Cache::new(false, DType::F32, &config, &device).unwrap();
                let logits = theirs.forward(&ids, 0, &mut cache).unwrap();
                assert_close(name, &floats(&ours.get(last).unwrap()), &floats(&logits));
            }
        }
    }
}
