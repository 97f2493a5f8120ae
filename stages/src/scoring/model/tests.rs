//! A reward model on disk scores as the model itself does, whosever ids it gets.

use std::path::Path;

use tandem_data::BpeTraining;
use tandem_engine::model::Blueprint;
use tandem_store::RunDir;

use super::*;
use crate::testing::{SMALL, rated};

const PROMPT: &str = "sentence number";
const RESPONSE: &str = " 7 has good words";
const SCALE: RewardScale = RewardScale { mean: 0.25, std: 0.5 };

fn tokenizer(vocab_size: usize) -> Tokenizer {
    let texts = ["sentence number 7 has good words", "sentence number 8 has bad words", "words words sentence"];
    BpeTraining { vocab_size, min_frequency: 1, begin_with_bos: false }.train(texts).unwrap()
}

/// Exports a small model with this head; returns it and the name of its folder.
fn exported(dir: &Path, head: Head, tokenizer: &Tokenizer) -> (Model, String) {
    std::fs::create_dir_all(dir).unwrap();
    let config = rated(dir, 4, SMALL);
    let mut made = models::initial(config.model.new.as_ref().unwrap(), tokenizer.clone(), 3).unwrap();
    if head == Head::Scalar {
        made.blueprint = Blueprint::initial(made.blueprint.spec().clone(), head, 3);
        made.missing_score = true;
        made = made.init_score(3);
    }
    let model = made.blueprint.model().unwrap();
    let scale = (head == Head::Scalar).then_some(SCALE);
    let run = RunDir::open(dir).unwrap();
    let mut staging = run.stage_export().unwrap();
    models::export(&model, tokenizer, &serde_json::Value::Null, scale, &config, Some(&mut staging)).unwrap();
    staging.publish(serde_json::Value::Null).unwrap();
    (model, run.export_path().display().to_string())
}

/// What the scaled head says at the last of `ids`.
fn direct(model: &Model, ids: &[u32]) -> f32 {
    let raw = model.scores(&Packed::from_sequences([ids]), &[ids.len() as u32 - 1]).unwrap();
    SCALE.apply(f64::from(raw.to_vec1::<f32>().unwrap()[0])) as f32
}

#[test]
fn ids_of_the_same_vocabulary_are_scored_as_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let policy = tokenizer(280);
    let (model, folder) = exported(dir.path(), Head::Scalar, &policy);
    let prompt = policy.encode(PROMPT).unwrap();
    let whole = policy.encode_response(RESPONSE).unwrap();
    let responses = [&whole[..], &whole[..whole.len() - 1], &whole[..1]];
    let items = responses.map(|response_ids| ScoreItem {
        prompt_ids: &prompt,
        response_ids,
        prompt_text: PROMPT,
        response_text: "not looked at",
    });
    let expected = responses.map(|response| direct(&model, &[&prompt, response].concat()));
    assert!(expected[0] != expected[1] && expected[1] != expected[2]);
    // Alone in a pass or all in one: the same bits.
    for budget in [1, 1000] {
        let mut scorer = ModelScorer::load(&Team::solo(), &folder, &policy, budget).unwrap();
        assert_eq!(scorer.score(&items).unwrap(), expected, "{budget}");
    }
}

#[test]
fn another_vocabulary_is_read_as_text() {
    let dir = tempfile::tempdir().unwrap();
    let (own, policy) = (tokenizer(300), tokenizer(260));
    let (model, folder) = exported(dir.path(), Head::Scalar, &own);
    let prompt = policy.encode(PROMPT).unwrap();
    let whole = policy.encode_response(RESPONSE).unwrap();
    let items = [&whole[..], &whole[..whole.len() - 1]].map(|response_ids| ScoreItem {
        prompt_ids: &prompt,
        response_ids,
        prompt_text: PROMPT,
        response_text: RESPONSE,
    });
    let read = [own.encode(PROMPT).unwrap(), own.encode_response(RESPONSE).unwrap()].concat();
    // The policy ended the first response itself; the second one was cut, so it has no end to be scored at.
    let expected = [direct(&model, &read), direct(&model, &read[..read.len() - 1])];
    assert!(expected[0] != expected[1]);
    let mut scorer = ModelScorer::load(&Team::solo(), &folder, &policy, 1000).unwrap();
    assert_eq!(scorer.score(&items).unwrap(), expected);
}

#[test]
fn what_cannot_be_scored_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let policy = tokenizer(280);
    let (_, folder) = exported(&dir.path().join("language"), Head::Language, &policy);
    let message = ModelScorer::load(&Team::solo(), &folder, &policy, 1000).err().unwrap().to_string();
    assert!(message.contains("without a scalar head"), "{message}");

    let (_, folder) = exported(&dir.path().join("reward"), Head::Scalar, &policy);
    let long = ScoreItem { prompt_ids: &[1; 65], response_ids: &[], prompt_text: "", response_text: "" };
    let message =
        ModelScorer::load(&Team::solo(), &folder, &policy, 1000).unwrap().score(&[long]).unwrap_err().to_string();
    assert!(message.contains("65 tokens"), "{message}");
}
