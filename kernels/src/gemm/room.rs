//! Memory for packed operands, kept from call to call.

/// Elements of a cache line.
const LINE: usize = 16;

/// Numbers that begin with a cache line: a vector that straddles two is read at half the speed.
#[derive(Default)]
pub(crate) struct Room {
    values: Vec<f32>,
    start: usize,
    len: usize,
}

impl Room {
    /// Room for `len` numbers, of any value.
    pub(super) fn first(&mut self, len: usize) -> &mut [f32] {
        if self.values.len() < len + LINE {
            // Not `resize`, which would copy what nobody reads.
            self.values = vec![0.0; len + LINE];
            self.start = self.values.as_ptr().align_offset(size_of::<[f32; LINE]>()).min(LINE);
        }
        self.len = len;
        &mut self.values[self.start..][..len]
    }

    /// What [`Room::first`] gave out last.
    pub(super) fn values(&self) -> &[f32] {
        &self.values[self.start..][..self.len]
    }
}
