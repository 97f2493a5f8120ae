//! The tests of tandem-data through its public surface, one module per room.

mod bad_columns;
mod bad_inputs;
mod dataset;
mod experience;
mod fields;
mod hub;
mod length;
mod order;
mod packing;
mod sources;
mod split;
mod support;
mod templates;
mod tokenizer;
