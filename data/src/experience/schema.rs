//! The columns of an experience file.

use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef};

/// Column names and types, in order; none is ever null.
pub fn schema() -> SchemaRef {
    let list = |item: DataType| DataType::List(Arc::new(Field::new_list_field(item, false)));
    let columns = [
        ("sample", DataType::UInt64),
        ("iteration", DataType::UInt32),
        ("policy_step", DataType::UInt64),
        ("prompt_ids", list(DataType::UInt32)),
        ("response_ids", list(DataType::UInt32)),
        ("logp", list(DataType::Float32)),
        ("ref_logp", list(DataType::Float32)),
        ("value", list(DataType::Float32)),
        ("score", DataType::Float32),
        ("finish", DataType::Utf8),
        ("prompt_text", DataType::Utf8),
        ("response_text", DataType::Utf8),
    ];
    Arc::new(Schema::new(columns.map(|(name, data_type)| Field::new(name, data_type, false)).to_vec()))
}
