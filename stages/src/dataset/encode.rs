//! Rows to token ids in parallel, with errors that name the row.

use rayon::prelude::*;
use tandem_data::length::LengthReport;
use tandem_data::{DataError, Located, Origin};

/// Applies `encode` to all rows. If several fail the error is that of the first, whatever the timing.
pub(super) fn encode_all<T: Send>(
    rows: Vec<Located>,
    encode: impl Fn(Located) -> Result<T, DataError> + Sync,
) -> Result<Vec<(Origin, T)>, DataError> {
    let encoded: Vec<Result<(Origin, T), DataError>> = rows
        .into_par_iter()
        .map(|row| {
            let origin = row.origin.clone();
            match encode(row) {
                Ok(encoded) => Ok((origin, encoded)),
                Err(error) => Err(located(&origin, error)),
            }
        })
        .collect();
    encoded.into_iter().collect()
}

/// Adds the row to an error that knows only the text.
fn located(origin: &Origin, error: DataError) -> DataError {
    match error {
        error @ (DataError::Text { .. } | DataError::Template { .. }) => {
            DataError::Field { origin: origin.to_string(), reason: error.to_string() }
        }
        other => other,
    }
}

/// Says what was cut or left out, if anything was.
pub(super) fn tell(what: &str, report: &LengthReport) {
    let LengthReport { whole, truncated, too_long, identical } = *report;
    if truncated + too_long + identical > 0 {
        tracing::info!("{what}: {whole} whole, {truncated} cut, {too_long} too long, {identical} with equal responses");
    }
}
