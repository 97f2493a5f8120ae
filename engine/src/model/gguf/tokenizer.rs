//! The tokenizer inside a GGUF file, as the `tokenizer.json` and `tokenizer_config.json` of a folder.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::metadata::Head;
use crate::Result;

/// Control tokens, which text must never be turned into.
const CONTROL: u64 = 3;
/// Tokens that users added: found in text before it is split.
const USER_DEFINED: u64 = 4;

/// What a folder of transformers would have beside its weights.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufTokenizer {
    /// `tokenizer.json`.
    pub tokenizer: Value,
    /// `tokenizer_config.json`, the chat template within.
    pub config: Value,
}

/// Reads the byte-level BPE tokenizer of the GGUF file `path`.
///
/// # Errors
/// If the file is damaged, or its tokenizer is of another kind or splits text by rules that are not known here.
pub fn tokenizer(path: &Path) -> Result<GgufTokenizer> {
    let head = Head::read(path)?;
    let model = head.text("tokenizer.ggml.model").unwrap_or("");
    if model != "gpt2" {
        return Err(head.refuse(format!("its tokenizer is {model:?}; only byte-level BPE (\"gpt2\") is supported")));
    }
    let list = |key: &str| head.texts(key).ok_or_else(|| head.refuse(format!("it lacks the list {key}")));
    let (tokens, merges) = (list("tokenizer.ggml.tokens")?, list("tokenizer.ggml.merges")?);
    let kinds = kinds(&head, tokens.len())?;
    let rules = head.text("tokenizer.ggml.pre").unwrap_or("gpt-2");
    let split = pre_tokenizer(rules)
        .ok_or_else(|| head.refuse(format!("the rules by which it splits text, {rules:?}, are not known here")))?;

    let added: Vec<Value> = tokens
        .iter()
        .zip(&kinds)
        .enumerate()
        .filter(|&(_, (_, &kind))| kind == CONTROL || kind == USER_DEFINED)
        .map(|(id, (token, &kind))| added_token(id, token, kind == CONTROL))
        .collect();
    let vocabulary: Map<String, Value> =
        tokens.iter().enumerate().map(|(id, token)| ((*token).to_string(), json!(id))).collect();
    if vocabulary.len() != tokens.len() {
        return Err(head.refuse("two of its tokens have the same text"));
    }
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": split,
        "post_processor": begin_with_bos(&head, rules, &tokens)?,
        "decoder": byte_level(true),
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            // Llama 3's vocabulary has words that its merges cannot reach.
            "ignore_merges": rules == "llama-bpe",
            "vocab": vocabulary,
            "merges": merges,
        },
    });
    Ok(GgufTokenizer { tokenizer, config: config(&head, &tokens)? })
}

/// The kind of each token; 1 (plain) where the file says nothing.
fn kinds(head: &Head, tokens: usize) -> Result<Vec<u64>> {
    let Some(field) = head.get("tokenizer.ggml.token_type") else { return Ok(vec![1; tokens]) };
    let list = field.to_vec().map(Vec::as_slice).unwrap_or_default();
    let kinds: Option<Vec<u64>> = list.iter().map(|kind| kind.to_i32().ok()?.try_into().ok()).collect();
    match kinds {
        Some(kinds) if kinds.len() == tokens => Ok(kinds),
        _ => Err(head.refuse("the kinds of its tokens are not a list of as many numbers as it has tokens")),
    }
}

fn added_token(id: usize, content: &str, special: bool) -> Value {
    json!({
        "id": id,
        "content": content,
        "single_word": false,
        "lstrip": false,
        "rstrip": false,
        "normalized": false,
        "special": special,
    })
}

/// The rule that puts the first token before every text, if the file asks for it.
fn begin_with_bos(head: &Head, rules: &str, tokens: &[&str]) -> Result<Value> {
    let asked = match head.get("tokenizer.ggml.add_bos_token") {
        Some(field) => field.to_bool().unwrap_or(false),
        // llama.cpp's own default for these rules.
        None => rules == "llama-bpe",
    };
    let Some((id, token)) = special(head, "bos", tokens)?.filter(|_| asked) else { return Ok(Value::Null) };
    let begin = json!({ "SpecialToken": { "id": token, "type_id": 0 } });
    let text = |name: &str, kind: u8| json!({ "Sequence": { "id": name, "type_id": kind } });
    Ok(json!({
        "type": "TemplateProcessing",
        "single": [begin, text("A", 0)],
        "pair": [begin, text("A", 0), text("B", 1)],
        "special_tokens": { token: { "id": token, "ids": [id], "tokens": [token] } },
    }))
}

/// Id and text of a special token.
fn special<'a>(head: &Head, field: &str, tokens: &[&'a str]) -> Result<Option<(u64, &'a str)>> {
    let Some(id) = head.whole(&format!("tokenizer.ggml.{field}_token_id")) else { return Ok(None) };
    let token = usize::try_from(id).ok().and_then(|id| tokens.get(id));
    match token {
        Some(token) => Ok(Some((id, token))),
        None => Err(head.refuse(format!("its {field} token {id} is not in its vocabulary"))),
    }
}

/// Bytes to printable characters, with GPT-2's own way of splitting or none.
fn byte_level(use_regex: bool) -> Value {
    json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex })
}

/// How text is split before BPE, by llama.cpp's name for it (`llama_vocab_pre_type`).
fn pre_tokenizer(rules: &str) -> Option<Value> {
    let by_pattern = |pattern: &str| {
        json!({
            "type": "Sequence",
            "pretokenizers": [
                { "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false },
                byte_level(false),
            ],
        })
    };
    Some(match rules {
        "default" | "gpt-2" | "gpt2" => byte_level(true),
        "smollm" => json!({
            "type": "Sequence",
            "pretokenizers": [{ "type": "Digits", "individual_digits": true }, byte_level(true)],
        }),
        "llama-bpe" | "llama3" | "llama-v3" => by_pattern(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        "qwen2" => by_pattern(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        _ => return None,
    })
}

/// Special tokens by their text, and the chat template.
fn config(head: &Head, tokens: &[&str]) -> Result<Value> {
    let mut fields = Map::new();
    for (name, field) in [("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")] {
        if let Some((_, token)) = special(head, field, tokens)? {
            fields.insert(format!("{name}_token"), json!(token));
        }
    }
    if let Some(template) = head.text("tokenizer.chat_template") {
        fields.insert("chat_template".into(), json!(template));
    }
    fields.insert("clean_up_tokenization_spaces".into(), json!(false));
    fields.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
    Ok(Value::Object(fields))
}
