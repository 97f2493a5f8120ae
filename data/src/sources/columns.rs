//! From columns to rows: the values of an Arrow record batch as JSON.

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::datatypes::{DataType, Field, Schema};
use serde_json::{Map, Number, Value};

use crate::limits;
use crate::row::Fields;

/// Whether a column of this type can become JSON. Columns of other types (times, binary, decimals) are left out.
pub(super) fn supported(data_type: &DataType) -> bool {
    use DataType::*;
    match data_type {
        Null | Boolean | Utf8 | LargeUtf8 | Utf8View => true,
        Int8 | Int16 | Int32 | Int64 | UInt8 | UInt16 | UInt32 | UInt64 | Float32 | Float64 => true,
        List(item) | LargeList(item) => supported(item.data_type()),
        Struct(fields) => fields.iter().all(|field| supported(field.data_type())),
        Dictionary(_, values) => supported(values),
        _ => false,
    }
}

/// Refuses schemas with absurdly many or deep columns, and those without a single usable one.
pub(super) fn check_schema(schema: &Schema) -> Result<(), String> {
    fn walk(field: &Field, depth: usize, leaves: &mut usize) -> bool {
        let deeper = match field.data_type() {
            DataType::List(item) | DataType::LargeList(item) => {
                return depth < limits::COLUMN_DEPTH && walk(item, depth + 1, leaves);
            }
            DataType::Struct(fields) => fields,
            _ => {
                *leaves += 1;
                return *leaves <= limits::COLUMNS;
            }
        };
        depth < limits::COLUMN_DEPTH && deeper.iter().all(|field| walk(field, depth + 1, leaves))
    }
    let mut leaves = 0;
    if !schema.fields().iter().all(|field| walk(field, 1, &mut leaves)) {
        return Err(format!("more than {} columns, or nested deeper than {}", limits::COLUMNS, limits::COLUMN_DEPTH));
    }
    let mut names: Vec<_> = schema.fields().iter().map(|field| field.name()).collect();
    names.sort();
    if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(format!("two columns are named {:?}", twice[0]));
    }
    let (usable, left_out): (Vec<_>, Vec<_>) = schema.fields().iter().partition(|field| supported(field.data_type()));
    if usable.is_empty() {
        return Err("no column of text, numbers, lists or structs".into());
    }
    for field in left_out {
        tracing::warn!(column = field.name(), data_type = %field.data_type(), "column left out: its type has no JSON form");
    }
    Ok(())
}

/// The rows of a batch, one after the other.
pub(super) fn rows(batch: &RecordBatch) -> impl Iterator<Item = Result<Fields, String>> + '_ {
    let schema = batch.schema();
    let columns: Vec<(String, ArrayRef)> = schema
        .fields()
        .iter()
        .zip(batch.columns())
        .filter(|(field, _)| supported(field.data_type()))
        .map(|(field, column)| (field.name().clone(), column.clone()))
        .collect();
    (0..batch.num_rows()).map(move |row| {
        let mut fields = Map::new();
        for (name, column) in &columns {
            let value = value(column.as_ref(), row).map_err(|reason| format!("column {name:?}: {reason}"))?;
            fields.insert(name.clone(), value);
        }
        Ok(fields)
    })
}

fn value(column: &dyn Array, row: usize) -> Result<Value, String> {
    use arrow::datatypes::*;
    if column.is_null(row) {
        return Ok(Value::Null);
    }
    macro_rules! integer {
        ($kind:ty) => {
            Value::from(column.as_primitive::<$kind>().value(row))
        };
    }
    Ok(match column.data_type() {
        DataType::Null => Value::Null,
        DataType::Boolean => Value::Bool(column.as_boolean().value(row)),
        DataType::Utf8 => Value::from(column.as_string::<i32>().value(row)),
        DataType::LargeUtf8 => Value::from(column.as_string::<i64>().value(row)),
        DataType::Utf8View => Value::from(column.as_string_view().value(row)),
        DataType::Int8 => integer!(Int8Type),
        DataType::Int16 => integer!(Int16Type),
        DataType::Int32 => integer!(Int32Type),
        DataType::Int64 => integer!(Int64Type),
        DataType::UInt8 => integer!(UInt8Type),
        DataType::UInt16 => integer!(UInt16Type),
        DataType::UInt32 => integer!(UInt32Type),
        DataType::UInt64 => integer!(UInt64Type),
        DataType::Float32 => float(f64::from(column.as_primitive::<Float32Type>().value(row)))?,
        DataType::Float64 => float(column.as_primitive::<Float64Type>().value(row))?,
        DataType::List(_) => list(column.as_list::<i32>().value(row).as_ref())?,
        DataType::LargeList(_) => list(column.as_list::<i64>().value(row).as_ref())?,
        DataType::Struct(fields) => {
            let column = column.as_struct();
            let mut object = Map::new();
            for (field, values) in fields.iter().zip(column.columns()) {
                object.insert(field.name().clone(), value(values.as_ref(), row)?);
            }
            Value::Object(object)
        }
        DataType::Dictionary(_, _) => {
            let column = column.as_any_dictionary();
            let key = column.normalized_keys()[row];
            value(column.values().as_ref(), key)?
        }
        other => return Err(format!("values of type {other} cannot be read")),
    })
}

fn float(number: f64) -> Result<Value, String> {
    Number::from_f64(number).map(Value::Number).ok_or_else(|| format!("{number} where a finite number belongs"))
}

fn list(items: &dyn Array) -> Result<Value, String> {
    (0..items.len()).map(|item| value(items, item)).collect::<Result<Vec<_>, _>>().map(Value::Array)
}

/// What the values of a row weigh, bytes: the text and a word per value.
pub(super) fn weight(fields: &Fields) -> u64 {
    fn of(value: &Value) -> u64 {
        8 + match value {
            Value::String(text) => text.len() as u64,
            Value::Array(items) => items.iter().map(of).sum(),
            Value::Object(fields) => weight(fields),
            _ => 0,
        }
    }
    fields.iter().map(|(name, value)| name.len() as u64 + of(value)).sum()
}

/// Keeps count of what a file decodes to and stops it when it is out of all proportion to the file.
pub(super) struct Budget {
    limit: u64,
    used: u64,
}

impl Budget {
    pub(super) fn for_file(bytes: u64) -> Self {
        Self { limit: limits::DECODED_BYTES.max(bytes.saturating_mul(limits::EXPANSION)), used: 0 }
    }

    pub(super) fn spend(&mut self, path: &std::path::Path, bytes: u64) -> crate::error::Result<()> {
        self.used = self.used.saturating_add(bytes);
        super::bounded(path, "what the file decodes to, in bytes,", self.used, self.limit)
    }
}
