//! The one home of every bound on what comes from outside. A bound turns a hostile or broken file into an error instead of
//! an exhausted machine; each is far above what honest data needs.

/// Longest line of a JSONL file, bytes.
pub const LINE_BYTES: usize = 8 << 20;

/// Largest JSON document (`.json`), which is parsed as a whole, bytes.
pub const JSON_FILE_BYTES: u64 = 1 << 30;

/// Largest number of rows that one source file may hold.
pub const ROWS: usize = 50_000_000;

/// Longest single text (one field, one message) that is tokenised, bytes.
pub const TEXT_BYTES: usize = 1 << 20;

/// Largest Parquet footer, bytes.
pub const PARQUET_FOOTER_BYTES: u64 = 16 << 20;

/// Largest number of leaf columns of a Parquet or Arrow file.
pub const COLUMNS: usize = 1_024;

/// Deepest nesting of a column (a list of structs of lists is 3).
pub const COLUMN_DEPTH: usize = 8;

/// Largest column chunk of a Parquet file after decompression, as the file declares it, bytes.
pub const COLUMN_CHUNK_BYTES: u64 = 1 << 30;

/// Largest decoded record batch held at once, bytes. Readers shrink the rows per batch to stay near it.
pub const BATCH_BYTES: usize = 64 << 20;

/// Most rows decoded into one record batch.
pub const BATCH_ROWS: usize = 4_096;

/// Largest Arrow IPC file, which is read into memory as a whole, bytes.
pub const ARROW_FILE_BYTES: u64 = 2 << 30;

/// What any Parquet or Arrow file may decode to, bytes; a larger one may decode to [`EXPANSION`] times its own size. (955 bytes
/// of Parquet can hold one string repeated to 8 GB; honest text shrinks to a third, rarely to a fiftieth.)
pub const DECODED_BYTES: u64 = 128 << 20;

/// How many times its own size a large Parquet or Arrow file may decode to.
pub const EXPANSION: u64 = 100;

/// Largest `tokenizer.json`, bytes.
pub const TOKENIZER_BYTES: u64 = 64 << 20;

/// Largest of the small JSON files beside a tokenizer, bytes.
pub const SIDE_FILE_BYTES: u64 = 4 << 20;

/// Longest chat template, bytes.
pub const TEMPLATE_BYTES: usize = 128 << 10;

/// Steps that one rendering of a chat template may take.
pub const TEMPLATE_FUEL: u64 = 200_000;

/// Largest value that a chat template may give a name to, and largest text it may write, bytes.
pub const TEMPLATE_VALUE_BYTES: usize = 2 << 20;

/// Most text that one rendering may move about in all, bytes.
pub const TEMPLATE_TEXT_BYTES: usize = 128 << 20;

/// Most joining operators (`+`, `~`) inside one tag of a chat template.
pub const TEMPLATE_JOINS: usize = 32;

/// Most filters and commas inside one tag of a chat template.
pub const TEMPLATE_OPERATORS: usize = 128;

/// Longest `range()` of a chat template.
pub const TEMPLATE_RANGE: i64 = 10_000;

/// Largest share of the rows that may be dropped (too long, identical pairs) before a run refuses to start.
pub const DROPPED_FRACTION: f64 = 0.5;
