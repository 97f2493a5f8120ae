//! Bounds on what a template can build.
//!
//! Fuel bounds the steps of a template but not its memory: `s = s ~ s` in a loop passes a gigabyte after thirty steps, and the
//! engine has no hook on `~`. But one expression can only grow a value by as many operands as are written in it; to grow
//! further, the result must get a name and be used again. So every place that gives a value a name (`set`, `for` targets, macro
//! parameters) is rewritten to pass it through the filter `bounded`, which fails above a size; operators per tag are
//! counted; and what multiplies in one step (`*`, recursive loops, most rarely used tags) is refused. Filters and methods that
//! multiply (`replace`, `join`) are bounded in [`super::builtins`].

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};

use crate::limits;

/// A template with its guards in place.
pub(super) struct Guarded {
    /// The rewritten source.
    pub(super) source: String,
    /// The longest stretch of plain text between tags, bytes.
    pub(super) longest_text: usize,
}

/// Puts the guards into a template.
pub(super) fn instrument(source: &str) -> Result<Guarded, String> {
    let mut guarded = Guarded { source: String::with_capacity(source.len() * 2), longest_text: 0 };
    let mut rest = source;
    while let Some(open) = rest.find("{%").into_iter().chain(rest.find("{{")).chain(rest.find("{#")).min() {
        let at = source.len() - rest.len() + open;
        let line = || 1 + source[..at].matches('\n').count();
        guarded.longest_text = guarded.longest_text.max(open);
        guarded.source.push_str(&rest[..open]);
        let (kind, inside) = rest[open..].split_at(2);
        let unclosed = || format!("line {}: a tag that begins with {kind} does not end", line());
        if kind == "{#" {
            let end = inside.find("#}").ok_or_else(unclosed)? + 2;
            guarded.source.push_str(kind);
            guarded.source.push_str(&inside[..end]);
            rest = &inside[end..];
            continue;
        }
        let close = if kind == "{%" { "%}" } else { "}}" };
        let end = tag_end(inside, close).ok_or_else(unclosed)?;
        let tag = &inside[..end];
        check_operators(tag).map_err(|reason| format!("line {}: {reason}", line()))?;
        if kind == "{%" {
            guarded.source.push_str(&rewrite(tag).map_err(|reason| format!("line {}: {reason}", line()))?);
        } else {
            guarded.source.push_str(&format!("{{{{{tag}}}}}"));
        }
        rest = &inside[end + 2..];
    }
    guarded.longest_text = guarded.longest_text.max(rest.len());
    guarded.source.push_str(rest);
    Ok(guarded)
}

/// Where a tag's inside ends; strings may hold the closing mark.
fn tag_end(inside: &str, close: &str) -> Option<usize> {
    let mut depth = 0usize;
    for (at, part) in outside_strings(inside) {
        // `}}` may also close two dictionaries inside an expression.
        if depth == 0 && inside[at..].starts_with(close) {
            return Some(at);
        }
        match part {
            '{' | '[' | '(' => depth += 1,
            '}' | ']' | ')' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    None
}

/// The characters of an expression that are not inside a string, with their places; the quotes are left out too.
fn outside_strings(expression: &str) -> impl Iterator<Item = (usize, char)> + '_ {
    let mut quote = None;
    let mut escaped = false;
    expression.char_indices().filter(move |&(_, character)| match quote {
        None if matches!(character, '\'' | '"') => {
            quote = Some(character);
            false
        }
        None => true,
        Some(open) => {
            if escaped {
                escaped = false;
            } else if character == '\\' {
                escaped = true;
            } else if character == open {
                quote = None;
            }
            false
        }
    })
}

fn check_operators(tag: &str) -> Result<(), String> {
    let (mut joins, mut others) = (0, 0);
    for (_, character) in outside_strings(tag) {
        match character {
            '*' => return Err("multiplication (*) is not supported in chat templates".into()),
            '+' | '~' => joins += 1,
            '|' | ',' => others += 1,
            _ => {}
        }
    }
    for (what, count, limit) in [
        ("joining operators (+, ~)", joins, limits::TEMPLATE_JOINS),
        ("filters and commas", others, limits::TEMPLATE_OPERATORS),
    ] {
        if count > limit {
            return Err(format!("{count} {what} in one tag, more than the {limit} allowed"));
        }
    }
    Ok(())
}

/// Rewrites the inside of a `{% … %}` tag, and gives the whole tag back, with further tags after it where needed.
fn rewrite(tag: &str) -> Result<String, String> {
    let (front, body) = match tag.as_bytes().first() {
        Some(b'-' | b'+') => tag.split_at(1),
        _ => ("", tag),
    };
    let (body, back) = match body.as_bytes().last() {
        Some(b'-' | b'+') => body.split_at(body.len() - 1),
        _ => (body, ""),
    };
    let body = body.trim();
    let keyword_end =
        body.find(|character: char| !character.is_alphanumeric() && character != '_').unwrap_or(body.len());
    let (keyword, rest) = body.split_at(keyword_end);
    // Guards of names that the tag itself binds follow it; the last tag carries the whitespace control.
    let with_guards = |names: Vec<String>| {
        let last = names.len().checked_sub(1);
        let mut text = format!("{{%{front} {body} {}%}}", if last.is_none() { back } else { "" });
        for (index, name) in names.iter().enumerate() {
            let back = if Some(index) == last { back } else { "" };
            text.push_str(&format!("{{% set {name} = ({name}) | bounded {back}%}}"));
        }
        text
    };
    match keyword {
        "set" => Ok(match rest.find('=') {
            Some(at) => format!("{{%{front} set{}= ({}) | bounded {back}%}}", &rest[..at], rest[at + 1..].trim()),
            None => format!("{{%{front} set{rest} | bounded {back}%}}"),
        }),
        "for" => {
            let (target, iterated) = split_at_in(rest).ok_or("a for tag without \"in\"")?;
            if words(iterated).any(|word| word == "recursive") {
                return Err("recursive loops are not supported in chat templates".into());
            }
            Ok(with_guards(words(target).map(str::to_owned).collect()))
        }
        "macro" => Ok(with_guards(parameters(rest)?)),
        // The generation block marks the assistant's words for training; the text is the same without it.
        "generation" => Ok(format!("{{%{front} if true {back}%}}")),
        "endgeneration" => Ok(format!("{{%{front} endif {back}%}}")),
        "if" | "elif" | "else" | "endif" | "endfor" | "endset" | "endmacro" | "break" | "continue" => {
            Ok(format!("{{%{tag}%}}"))
        }
        other => Err(format!("the tag {other:?} is not supported in chat templates")),
    }
}

/// What stands before and after the first word `in`.
fn split_at_in(text: &str) -> Option<(&str, &str)> {
    let blank = |character: char| character.is_whitespace();
    text.match_indices("in").map(|(at, word)| (&text[..at], &text[at + word.len()..])).find(|(before, after)| {
        before.ends_with(blank) && !after.starts_with(|c: char| c.is_alphanumeric() || c == '_')
    })
}

/// The names in a piece of an expression.
fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|character: char| !character.is_alphanumeric() && character != '_').filter(|word| !word.is_empty())
}

/// The parameters of a macro: the names that follow the opening bracket or a comma at its level.
fn parameters(signature: &str) -> Result<Vec<String>, String> {
    let open = signature.find('(').ok_or("a macro tag without parameters")?;
    let inside = &signature[open + 1..];
    let mut names = Vec::new();
    let (mut depth, mut expects_name) = (0usize, true);
    for (at, character) in outside_strings(inside) {
        if expects_name && !character.is_whitespace() && character != ')' {
            names.extend(words(&inside[at..]).next().map(str::to_owned));
            expects_name = false;
        }
        match character {
            ')' if depth == 0 => return Ok(names),
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => expects_name = true,
            _ => {}
        }
    }
    Err("a macro tag whose parameters do not end".into())
}

/// What a value weighs written out, bytes; an error above [`limits::TEMPLATE_VALUE_BYTES`].
pub(super) fn check_size(value: &Value) -> Result<usize, Error> {
    let mut left = limits::TEMPLATE_VALUE_BYTES;
    weigh(value, &mut left, 0)?;
    Ok(limits::TEMPLATE_VALUE_BYTES - left)
}

/// The error of a value that is too large.
pub(super) fn too_large() -> Error {
    let limit = limits::TEMPLATE_VALUE_BYTES;
    Error::new(ErrorKind::InvalidOperation, format!("it builds a value of more than {limit} bytes"))
}

fn weigh(value: &Value, left: &mut usize, depth: usize) -> Result<(), Error> {
    const DEPTH: usize = 64;
    const SCALAR: usize = 8;
    let own = value.as_str().map_or(SCALAR, str::len);
    *left = left.checked_sub(own).filter(|_| depth < DEPTH).ok_or_else(too_large)?;
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => {
            for item in value.try_iter()? {
                weigh(&item, left, depth + 1)?;
            }
        }
        ValueKind::Map => {
            for key in value.try_iter()? {
                weigh(&value.get_item(&key)?, left, depth + 1)?;
                weigh(&key, left, depth + 1)?;
            }
        }
        _ => {}
    }
    Ok(())
}
