//! Text and rows: from files to token ids, and from rollouts to files.
//!
//! ```text
//! file ─sources→ Row ─fields→ Example ─tokenizer (template)→ Encoded ─length→ ─packing→ micro-batches
//!                 └─ dataset: split into phases, held out, blended  ·  order: which sample next, and the cursor to resume from
//! rollouts ⇄ experience (Parquet)                 hub: from a model's name to its folder
//! ```
//!
//! This crate knows nothing of tensors or models. All that comes from outside is bounded ([`limits`]), and what is wrong with it
//! is an error that names the file, the row and the remedy ([`error`]).

pub mod blend;
pub mod dataset;
pub mod error;
pub mod example;
pub mod experience;
pub mod fields;
pub mod hub;
pub mod length;
pub mod limits;
pub mod order;
pub mod packing;
pub mod row;
pub mod sources;
pub mod split;
pub mod template;
pub mod tokenizer;

pub use dataset::{Dataset, Located, Source};
pub use error::{DataError, Result};
pub use example::{Comparison, Demonstration, Example, Message, Prompt};
pub use fields::FieldMap;
pub use order::{Cursor, Sampler};
pub use row::{Origin, Row};
pub use sources::{OnBadRow, ReadOptions, Rows, read_rows};
pub use split::{Part, Split};
pub use tokenizer::{BpeTraining, Encoded, Tokenizer};
