//! Memory whose first element begins a cache line, kept from call to call.

/// Elements of a cache line.
const LINE: usize = 16;

/// Numbers that begin with a cache line: a vector that straddles two is read at half the speed.
#[derive(Debug, Default)]
pub(crate) struct Room {
    values: Vec<f32>,
    start: usize,
    len: usize,
}

impl Room {
    /// Room for `len` zeros.
    pub(crate) fn zeros(len: usize) -> Self {
        let mut room = Self::default();
        room.first(len);
        room
    }

    /// Room for `len` numbers, of any value.
    pub(crate) fn first(&mut self, len: usize) -> &mut [f32] {
        if self.values.len() < len + LINE {
            // Not `resize`, which would copy what nobody reads.
            self.values = vec![0.0; len + LINE];
            self.start = self.values.as_ptr().align_offset(size_of::<[f32; LINE]>()).min(LINE);
        }
        self.len = len;
        &mut self.values[self.start..][..len]
    }
}

impl std::ops::Deref for Room {
    type Target = [f32];

    /// What [`Room::first`] gave out last.
    fn deref(&self) -> &[f32] {
        &self.values[self.start..][..self.len]
    }
}

impl std::ops::DerefMut for Room {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.values[self.start..][..self.len]
    }
}
