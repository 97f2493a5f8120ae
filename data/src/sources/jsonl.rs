//! JSON Lines: one object per line. A byte-order mark, CRLF line ends and blank lines are fine; bytes that are not UTF-8, a
//! cut line or anything but an object make a bad row.

use std::io::{BufRead, BufReader};
use std::path::Path;

use serde_json::Value;

use super::{Collector, regular_file, strict};
use crate::error::{DataError, Result};
use crate::limits;
use crate::row::Fields;

pub(super) fn read(path: &Path, rows: &mut Collector<'_>) -> Result<()> {
    let (file, _) = regular_file(path)?;
    let mut reader = BufReader::with_capacity(1 << 16, file);
    let mut line = Vec::new();
    let mut number = 0;
    loop {
        line.clear();
        let fits = read_line(&mut reader, &mut line).map_err(|source| DataError::io(path, source))?;
        if line.is_empty() {
            return Ok(());
        }
        number += 1;
        if !fits {
            let limit = limits::LINE_BYTES >> 20;
            rows.line(number, Err(format!("the line is longer than {limit} MiB (is a line break missing?)")))?;
            continue;
        }
        let mut content = line.strip_suffix(b"\n").unwrap_or(&line);
        content = content.strip_suffix(b"\r").unwrap_or(content);
        if number == 1 {
            content = content.strip_prefix(b"\xef\xbb\xbf").unwrap_or(content);
        }
        if content.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        rows.line(number, parse_line(content))?;
    }
}

/// Reads up to and with the next line feed. `false`: the line passes the limit; its rest is read over, and `line` holds its
/// beginning only, so that no line is ever held in full.
fn read_line(reader: &mut impl BufRead, line: &mut Vec<u8>) -> std::io::Result<bool> {
    let mut fits = true;
    loop {
        let chunk = match reader.fill_buf() {
            Ok(chunk) => chunk,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        if chunk.is_empty() {
            return Ok(fits);
        }
        let end = chunk.iter().position(|&byte| byte == b'\n').map(|at| at + 1);
        let taken = end.unwrap_or(chunk.len());
        fits &= line.len() + taken <= limits::LINE_BYTES;
        if fits {
            line.extend_from_slice(&chunk[..taken]);
        }
        reader.consume(taken);
        if end.is_some() {
            return Ok(fits);
        }
    }
}

fn parse_line(line: &[u8]) -> Result<Fields, String> {
    let text = std::str::from_utf8(line).map_err(|error| format!("not UTF-8 at byte {}", error.valid_up_to() + 1))?;
    match strict::parse(text) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(Value::Array(_)) => Err("a list where an object belongs (a JSON document goes into a .json file)".into()),
        Ok(other) => Err(format!("{} where an object belongs", strict::kind(&other))),
        Err(error) if error.is_eof() && text.trim_start().starts_with('[') => {
            Err("the beginning of a list: a JSON document goes into a .json file".into())
        }
        Err(error) if error.is_eof() => Err(format!("the JSON is cut at column {}", error.column())),
        Err(error) => Err(format!("not JSON: {error}").replace("at line 1 column", "at column")),
    }
}
