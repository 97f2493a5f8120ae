//! Decoding while ids arrive, for chat: text comes out as soon as it is final.

use super::Tokenizer;
use crate::error::Result;

/// Decodes ids one at a time. A token may hold a part of a character; such bytes wait for the rest.
#[derive(Debug)]
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
    /// Ids before this are only context: how a token reads can depend on the one before (leading blanks).
    context: usize,
    /// Ids before this have been given out as text.
    given: usize,
}

impl<'a> StreamDecoder<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, ids: Vec::new(), context: 0, given: 0 }
    }

    /// Takes an id; returns the text that is now final, perhaps empty.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        self.take(false)
    }

    /// The text of what still waits; an unfinished character becomes U+FFFD.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(mut self) -> Result<String> {
        self.take(true)
    }

    fn take(&mut self, all: bool) -> Result<String> {
        let before = self.tokenizer.decode(&self.ids[self.context..self.given])?;
        let now = self.tokenizer.decode(&self.ids[self.context..])?;
        let unfinished = now.ends_with('\u{fffd}') && !all;
        if unfinished || now.len() <= before.len() || !now.is_char_boundary(before.len()) {
            return Ok(String::new());
        }
        self.context = self.given;
        self.given = self.ids.len();
        Ok(now[before.len()..].to_owned())
    }
}
