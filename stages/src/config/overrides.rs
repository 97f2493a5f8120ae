//! `--set section.key=value`: one value of the configuration, given on the command line.

use toml::{Table, Value};

use super::error::ConfigError;

/// One `--set`.
#[derive(Debug, Clone)]
pub(super) struct Override {
    /// The argument as it was given.
    pub(super) argument: String,
    /// The keys; a number picks an item of a list.
    path: Vec<String>,
    value: Value,
}

impl Override {
    /// Reads `section.key=value`. The value is TOML; what is not, like `cosine` or `runs/one`, is a string.
    pub(super) fn parse(argument: &str) -> Result<Self, ConfigError> {
        let (path, value) = argument.split_once('=').ok_or_else(|| fault(argument, "there is no `=`"))?;
        let path: Vec<String> = path.split('.').map(|key| key.trim().to_owned()).collect();
        if path.iter().any(String::is_empty) {
            return Err(fault(argument, "a key is empty"));
        }
        Ok(Self { argument: argument.to_owned(), path, value: parse_value(value.trim()) })
    }

    /// Puts the value in its place, making the tables on the way.
    pub(super) fn apply(&self, table: &mut Table) -> Result<(), ConfigError> {
        let Some((first, rest)) = self.path.split_first() else { return Ok(()) };
        let mut place = table.entry(first).or_insert_with(|| Value::Table(Table::new()));
        for key in rest {
            place = match place {
                Value::Table(table) => table.entry(key).or_insert_with(|| Value::Table(Table::new())),
                Value::Array(items) => {
                    let length = items.len();
                    key.parse::<usize>().ok().and_then(|index| items.get_mut(index)).ok_or_else(|| {
                        fault(&self.argument, &format!("`{key}` is not an item of a list of {length}"))
                    })?
                }
                other => {
                    let problem = format!("`{key}` is looked for inside a {}", other.type_str());
                    return Err(fault(&self.argument, &problem));
                }
            };
        }
        *place = self.value.clone();
        Ok(())
    }

    /// Whether this override set the value at `path` (`data.sources[0].path`), or something around or inside it.
    pub(super) fn touches(&self, path: &str) -> bool {
        let path: Vec<&str> = path.split(['.', '[', ']']).filter(|key| !key.is_empty()).collect();
        path.iter().zip(&self.path).all(|(one, other)| one == other)
    }
}

fn parse_value(text: &str) -> Value {
    // A line break could smuggle in further keys; a one-line document with one key is exactly one value.
    let document = (!text.contains('\n')).then(|| format!("value = {text}"));
    let parsed = document.and_then(|document| toml::from_str::<Table>(&document).ok());
    match parsed.and_then(|mut table| table.remove("value")) {
        Some(value) => value,
        None => Value::String(text.to_owned()),
    }
}

fn fault(argument: &str, problem: &str) -> ConfigError {
    ConfigError::Override { argument: argument.to_owned(), problem: problem.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn apply(start: &str, argument: &str) -> Result<String, ConfigError> {
        let mut table: Table = toml::from_str(start).unwrap();
        Override::parse(argument)?.apply(&mut table)?;
        Ok(Value::Table(table).to_string())
    }

    #[test]
    fn values_are_toml_or_bare_words() {
        for (argument, value) in [
            ("a.b=5", Value::Integer(5)),
            ("a.b = 1e-3", Value::Float(1e-3)),
            ("a.b=true", Value::Boolean(true)),
            ("a.b=cosine", Value::String("cosine".into())),
            ("a.b=\"5\"", Value::String("5".into())),
            ("a.b=2,4,4", Value::String("2,4,4".into())),
            ("a.b=runs/one=two", Value::String("runs/one=two".into())),
            ("a.b=[1, 2]", Value::Array(vec![Value::Integer(1), Value::Integer(2)])),
            ("a.b=1\nc = 2", Value::String("1\nc = 2".into())),
            ("a.b=", Value::String(String::new())),
        ] {
            assert_eq!(Override::parse(argument).unwrap().value, value, "{argument}");
        }
    }

    #[test]
    fn tables_are_made_and_lists_are_indexed() {
        assert_eq!(apply("", "a.b.c=1").unwrap(), "{ a = { b = { c = 1 } } }");
        assert_eq!(apply("a = [{ b = 1 }, { b = 2 }]", "a.1.b=3").unwrap(), "{ a = [{ b = 1 }, { b = 3 }] }");
        for bad in ["a.5.b=1", "a.x=1", "c.d=1"] {
            assert!(matches!(apply("a = [1]\nc = 1", bad), Err(ConfigError::Override { .. })), "{bad}");
        }
        for bad in ["a.b", "=1", "a..b=1", ".a=1"] {
            assert!(matches!(apply("", bad), Err(ConfigError::Override { .. })), "{bad}");
        }
    }

    #[test]
    fn an_override_knows_what_it_set() {
        let one = Override::parse("data.sources.0.path=x").unwrap();
        assert!(one.touches("data.sources[0].path"));
        assert!(one.touches("data.sources[0]"));
        assert!(!one.touches("data.sources[1].path"));
        assert!(!one.touches("ppo.iterations"));
    }
}
