//! The functions, filters and methods that chat templates may use: those of Jinja2 and of Python's strings, lists and
//! dictionaries, without the ones that could multiply a value's size unseen.

use std::fmt::Write as _;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value};
use minijinja_contrib::pycompat;

use super::guard::{check_size, too_large};
use crate::limits;

/// Bytes that one rendering has written, named, or produced in `replace` and `join`.
#[derive(Default)]
struct Meter {
    bytes: usize,
}

/// The environment as `transformers` sets it up.
pub(super) fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    if let Ok(syntax) = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build() {
        environment.set_syntax(syntax);
    }
    environment.set_recursion_limit(64);
    environment.set_formatter(write);
    environment.set_unknown_method_callback(method);
    for filter in ["batch", "chain", "format", "groupby", "indent", "lines", "pprint", "slice", "sum", "zip"] {
        environment.remove_filter(filter);
    }
    environment.add_filter("bounded", bounded);
    environment.add_filter("replace", replace);
    environment.add_filter("join", join);
    environment.add_filter("map", map);
    environment.add_filter("tojson", to_json);
    environment.remove_global("debug");
    environment.add_function("range", range);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment
}

fn refuse(reason: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason)
}

/// Counts bytes about to be produced.
fn spend(state: &mut State<'_, '_>, bytes: usize) -> Result<(), Error> {
    let meter = state.get_or_insert_extension_with(Meter::default);
    meter.bytes = meter.bytes.saturating_add(bytes);
    if bytes > limits::TEMPLATE_VALUE_BYTES || meter.bytes > limits::TEMPLATE_TEXT_BYTES {
        return Err(too_large());
    }
    Ok(())
}

/// The value itself, if it is not too large (a filter, as a template could redefine a function).
fn bounded(state: &mut State<'_, '_>, value: Value) -> Result<Value, Error> {
    let bytes = check_size(&value)?;
    spend(state, bytes)?;
    Ok(value)
}

/// Writes a value the way Python would.
fn write(out: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    let bytes = check_size(value)?;
    spend(state, bytes)?;
    let written = match value.kind() {
        ValueKind::Undefined => Ok(()),
        ValueKind::None => out.write_str("None"),
        ValueKind::Bool => out.write_str(if value.is_true() { "True" } else { "False" }),
        _ => write!(out, "{value}"),
    };
    written.map_err(|_| Error::new(ErrorKind::WriteFailure, "the text could not be written"))
}

fn replace(state: &mut State<'_, '_>, text: &str, from: &str, to: &str) -> Result<String, Error> {
    let found = text.matches(from).count();
    spend(state, text.len().saturating_add(found.saturating_mul(to.len())))?;
    Ok(text.replace(from, to))
}

fn join(state: &mut State<'_, '_>, items: Value, separator: Option<&str>) -> Result<String, Error> {
    let bytes = check_size(&items)?;
    let separator = separator.unwrap_or("");
    let count = items.try_iter()?.count();
    spend(state, bytes.saturating_add(count.saturating_mul(separator.len())))?;
    let mut text = String::new();
    for (index, item) in items.try_iter()?.enumerate() {
        if index > 0 {
            text.push_str(separator);
        }
        let _ = write!(text, "{item}");
    }
    Ok(text)
}

/// `map(attribute="x")` and `map("filter")` with filters that keep sizes.
fn map(state: &mut State<'_, '_>, items: Value, filters: Rest<Value>, options: Kwargs) -> Result<Value, Error> {
    const FILTERS: &[&str] = &["trim", "upper", "lower", "title", "capitalize", "string", "length", "int", "float"];
    check_size(&items)?;
    let attribute: Option<Value> = options.get("attribute")?;
    options.assert_all_used()?;
    let mut mapped = Vec::new();
    for item in items.try_iter()? {
        mapped.push(match (&attribute, filters.first().and_then(|name| name.as_str())) {
            (Some(attribute), None) => item.get_item(attribute)?,
            (None, Some(name)) if FILTERS.contains(&name) => state.apply_filter(name, &[item])?,
            _ => return Err(refuse("map() takes attribute=… or the name of a simple filter")),
        });
    }
    Ok(Value::from(mapped))
}

fn range(first: i64, second: Option<i64>, step: Option<i64>) -> Result<Value, Error> {
    let (start, end) = second.map_or((0, first), |end| (first, end));
    let step = step.unwrap_or(1);
    if step == 0 {
        return Err(refuse("range() with a step of 0"));
    }
    let count = (i128::from(end) - i128::from(start)).div_euclid(i128::from(step)).max(0);
    if count > i128::from(limits::TEMPLATE_RANGE) {
        return Err(refuse(format!("range() of {count}, more than the {} allowed", limits::TEMPLATE_RANGE)));
    }
    let mut numbers = Vec::new();
    let mut number = start;
    while (step > 0 && number < end) || (step < 0 && number > end) {
        numbers.push(number);
        let Some(next) = number.checked_add(step) else { break };
        number = next;
    }
    Ok(Value::from(numbers))
}

fn raise_exception(reason: String) -> Result<Value, Error> {
    Err(refuse(format!("the template refuses the conversation: {reason}")))
}

/// A fixed day, 26 July 2024, the one Llama 3's template falls back to: what a run trains on must not depend on when it runs.
fn strftime_now(format: &str) -> Result<String, Error> {
    let mut text = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            text.push(character);
            continue;
        }
        text.push_str(match characters.next() {
            Some('d') => "26",
            Some('m') => "07",
            Some('b') => "Jul",
            Some('B') => "July",
            Some('y') => "24",
            Some('Y') => "2024",
            Some('a') => "Fri",
            Some('A') => "Friday",
            Some('H' | 'M' | 'S') => "00",
            Some('%') => "%",
            other => return Err(refuse(format!("strftime_now with the unknown directive %{}", other.unwrap_or(' ')))),
        });
    }
    Ok(text)
}

/// Python's methods. Those that keep sizes are `minijinja-contrib`'s.
fn method(state: &mut State<'_, '_>, value: &Value, name: &str, arguments: &[Value]) -> Result<Value, Error> {
    const KEEP_SIZES: &[&str] = &[
        "strip",
        "lstrip",
        "rstrip",
        "upper",
        "lower",
        "title",
        "capitalize",
        "startswith",
        "endswith",
        "split",
        "splitlines",
        "find",
        "rfind",
        "count",
        "isdigit",
        "isalpha",
        "isalnum",
        "isupper",
        "islower",
        "isnumeric",
        "isascii",
        "isspace",
        "get",
        "items",
        "keys",
        "values",
    ];
    match (name, value.as_str()) {
        ("replace", Some(text)) => {
            let (from, to): (&str, &str) = from_args(arguments)?;
            replace(state, text, from, to).map(Value::from)
        }
        ("join", Some(separator)) => {
            let (items,): (Value,) = from_args(arguments)?;
            join(state, items, Some(separator)).map(Value::from)
        }
        _ if KEEP_SIZES.contains(&name) => pycompat::unknown_method_callback(state, value, name, arguments),
        _ => {
            Err(Error::new(ErrorKind::UnknownMethod, format!("the method {name}() is not supported in chat templates")))
        }
    }
}

/// JSON as Python's `json.dumps(value, ensure_ascii=False, indent=indent)` writes it.
fn to_json(state: &mut State<'_, '_>, value: Value, options: Kwargs) -> Result<Value, Error> {
    const WIDEST_INDENT: usize = 16;
    let bytes = check_size(&value)?;
    let indent: Option<usize> = options.get("indent")?;
    // Other arguments of json.dumps are taken and change nothing in the cases that templates have.
    let _: (Option<Value>, Option<Value>) = (options.get("ensure_ascii")?, options.get("separators")?);
    options.assert_all_used()?;
    if indent.is_some_and(|indent| indent > WIDEST_INDENT) {
        return Err(refuse(format!("tojson with an indent of more than {WIDEST_INDENT}")));
    }
    let mut text = String::new();
    dump(&value, indent, 0, &mut text)?;
    spend(state, bytes.max(text.len()))?;
    Ok(Value::from_safe_string(text))
}

fn dump(value: &Value, indent: Option<usize>, level: usize, text: &mut String) -> Result<(), Error> {
    let new_line = |text: &mut String, level: usize| {
        if let Some(indent) = indent {
            text.push('\n');
            text.extend(std::iter::repeat_n(' ', indent * level));
        }
    };
    let separator = if indent.is_some() { "," } else { ", " };
    match value.kind() {
        ValueKind::Undefined | ValueKind::None => text.push_str("null"),
        ValueKind::Bool => text.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => {
            let _ = write!(text, "{value}");
        }
        ValueKind::Seq | ValueKind::Iterable => {
            text.push('[');
            let mut any = false;
            for item in value.try_iter()? {
                if any {
                    text.push_str(separator);
                }
                new_line(text, level + 1);
                dump(&item, indent, level + 1, text)?;
                any = true;
            }
            if any {
                new_line(text, level);
            }
            text.push(']');
        }
        ValueKind::Map => {
            text.push('{');
            let mut any = false;
            for key in value.try_iter()? {
                if any {
                    text.push_str(separator);
                }
                new_line(text, level + 1);
                text.push_str(&quoted(&key.to_string()));
                text.push_str(": ");
                dump(&value.get_item(&key)?, indent, level + 1, text)?;
                any = true;
            }
            if any {
                new_line(text, level);
            }
            text.push('}');
        }
        _ => text.push_str(&quoted(&value.to_string())),
    }
    Ok(())
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}
