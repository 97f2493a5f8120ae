//! What a `tokenizer.json` is checked for before it is trusted.
//!
//! It is data, but two things in it can do harm: regular expressions run on a backtracking engine, which on some inputs gives up
//! and then *silently* splits the text otherwise; and declared token ids can differ from the ids the library assigns.

use serde_json::Value;
use tokenizers::Tokenizer as HfTokenizer;

/// Longest regular expression; the longest in use has about 600 characters.
const PATTERN_BYTES: usize = 4_096;

/// Refuses regular expressions with nested repetition or back-references, the ones that make matching exponential.
pub(super) fn patterns(bytes: &[u8]) -> Result<(), String> {
    let json: Value = serde_json::from_slice(bytes).map_err(|error| format!("tokenizer.json is not JSON: {error}"))?;
    let mut found = Vec::new();
    for part in ["normalizer", "pre_tokenizer", "decoder"] {
        collect(&json[part], &mut found);
    }
    match found.into_iter().find(|pattern| pattern.len() > PATTERN_BYTES || explosive(pattern)) {
        None => Ok(()),
        Some(pattern) => {
            let shown: String = pattern.chars().take(60).collect();
            Err(format!("its regular expression {shown:?} can take exponential time on some texts and is refused"))
        }
    }
}

fn collect<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
    match value {
        Value::Object(fields) => fields.iter().for_each(|(name, value)| match value.as_str() {
            Some(pattern) if name == "Regex" => found.push(pattern),
            _ => collect(value, found),
        }),
        Value::Array(values) => values.iter().for_each(|value| collect(value, found)),
        _ => {}
    }
}

/// Whether an unbounded repetition contains another one or an alternation (`(a+)+`, `(a|a)*`), or a group is referred back to.
fn explosive(pattern: &str) -> bool {
    /// What an open group has been seen to contain.
    #[derive(Default, Clone, Copy)]
    struct Group {
        repeats: bool,
        alternates: bool,
    }
    let characters: Vec<char> = pattern.chars().collect();
    let mut groups = vec![Group::default()];
    let mut closed = None;
    let mut at = 0;
    while at < characters.len() {
        let just_closed = closed.take();
        match characters[at] {
            '\\' => {
                at += 1;
                if characters.get(at).is_some_and(|c| matches!(c, '1'..='9' | 'k')) {
                    return true;
                }
            }
            '[' => at = class_end(&characters, at),
            '(' => groups.push(Group::default()),
            ')' => closed = groups.pop(),
            '|' => {
                if let Some(group) = groups.last_mut() {
                    group.alternates = true;
                }
            }
            // The `?` of `(?:…)` is no repetition, and `??` or `+?` only turn greed off.
            '*' | '+' | '{' => {
                let unbounded = characters[at] != '{' || open_range(&characters[at..]);
                if unbounded && just_closed.is_some_and(|group: Group| group.repeats || group.alternates) {
                    return true;
                }
                if let Some(group) = groups.last_mut() {
                    group.repeats |= unbounded;
                }
            }
            _ => {}
        }
        // A group inside a group: what it contains, the outer one contains.
        if let (Some(inner), Some(outer)) = (closed, groups.last_mut()) {
            outer.repeats |= inner.repeats;
        }
        at += 1;
    }
    false
}

/// Whether a brace begins a repetition without an upper bound, `{n,}`.
fn open_range(rest: &[char]) -> bool {
    let inside: String = rest.iter().skip(1).take_while(|&&c| c != '}').collect();
    inside.ends_with(',')
}

/// The place of the bracket that ends a character class; classes nest.
fn class_end(characters: &[char], open: usize) -> usize {
    let mut depth = 0usize;
    let mut at = open;
    while at < characters.len() {
        match characters[at] {
            '\\' => at += 1,
            '[' => depth += 1,
            ']' => {
                depth -= 1;
                if depth == 0 {
                    return at;
                }
            }
            _ => {}
        }
        at += 1;
    }
    at
}

/// Every added token must have the id that the file declares, and no other token that id.
pub(super) fn added_tokens(tokenizer: &HfTokenizer, bytes: &[u8]) -> Result<(), String> {
    let json: Value = serde_json::from_slice(bytes).map_err(|error| format!("tokenizer.json is not JSON: {error}"))?;
    let mut ids = std::collections::BTreeMap::new();
    for (token, id) in tokenizer.get_vocab(true) {
        if let Some(other) = ids.insert(id, token.clone()) {
            return Err(format!("the tokens {other:?} and {token:?} share the id {id}; the file contradicts itself"));
        }
    }
    for entry in json["added_tokens"].as_array().into_iter().flatten() {
        let (Some(content), Some(id)) = (entry["content"].as_str(), entry["id"].as_u64()) else {
            return Err("an added token has no text or no id".into());
        };
        let actual = tokenizer.token_to_id(content).map(u64::from);
        if actual != Some(id) {
            return Err(format!(
                "the added token {content:?} is declared as id {id} but gets {actual:?}; ids have a gap"
            ));
        }
    }
    Ok(())
}
