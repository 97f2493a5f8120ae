//! Files and rows for the tests.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};
use tandem_data::tokenizer::TokenizerFiles;
use tandem_data::{BpeTraining, Origin, Row, Tokenizer};

/// A file of the given name and content in a folder that lives as long as the guard.
pub(crate) fn file(name: &str, content: impl AsRef<[u8]>) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, content).unwrap();
    (folder, path)
}

/// A row that stands nowhere in particular.
pub(crate) fn row(fields: Value) -> Row {
    let file: Arc<Path> = Arc::from(Path::new("rows.jsonl"));
    Row { fields: fields.as_object().unwrap().clone(), origin: Origin::line(&file, 7) }
}

/// Random numbers for tests (Marsaglia's xorshift64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound as u64) as usize
    }
}

pub(crate) const CORPUS: &[&str] = &[
    "the film is a good film, and the actors are good too",
    "the film is bad; the plot is thin and the actors are thin",
    "a moving, funny and well acted film that is never dull",
    "never was a plot so dull, never were actors so bad",
    "naïve café — 東京 🙂 it's what they've said",
];

/// A small tokenizer trained on [`CORPUS`].
pub(crate) fn plain_tokenizer() -> Tokenizer {
    BpeTraining { vocab_size: 320, min_frequency: 2, begin_with_bos: true }.train(CORPUS).unwrap()
}

pub(crate) const CHATML: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ \
     '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{\
     '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if \
     add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// The same with ChatML's control tokens and template.
pub(crate) fn chat_tokenizer() -> Tokenizer {
    let mut json: Value = serde_json::from_slice(plain_tokenizer().files().tokenizer()).unwrap();
    let next = json["model"]["vocab"].as_object().unwrap().len();
    let added = json["added_tokens"].as_array_mut().unwrap();
    for (offset, content) in ["<|im_start|>", "<|im_end|>"].into_iter().enumerate() {
        added.push(json!({ "id": next + offset, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true }));
    }
    json["post_processor"] = Value::Null;
    let config =
        json!({ "bos_token": "<|im_start|>", "eos_token": { "content": "<|im_end|>" }, "chat_template": CHATML });
    let files = TokenizerFiles::new(json.to_string().into_bytes()).with_config(&config);
    Tokenizer::from_files("chat", files).unwrap()
}
