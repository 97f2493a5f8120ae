//! A rank's slice of a unit's flat buffer, in memory or in a file.

use std::ops::Range;
use std::path::Path;

use memmap2::MmapMut;
#[cfg(unix)]
use memmap2::UncheckedAdvice;
use serde::{Deserialize, Serialize};

use crate::model::unit::BLOCK_ELEMENTS;
use crate::{Error, Result};

/// How a flat buffer is cut into equal slices, one for each of some ranks.
///
/// Slices begin at multiples of [`BLOCK_ELEMENTS`]; the last ones are padded with zeros, or are nothing but padding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slicing {
    /// Elements of the buffer.
    pub len: usize,
    /// Ranks.
    pub ranks: usize,
}

impl Slicing {
    /// Elements of a slice, padding included.
    pub fn each(&self) -> usize {
        match self.ranks {
            1 => self.len,
            ranks => self.len.div_ceil(ranks * BLOCK_ELEMENTS) * BLOCK_ELEMENTS,
        }
    }

    /// Elements of all slices.
    pub fn padded(&self) -> usize {
        self.each() * self.ranks
    }

    /// Elements of the buffer that the slice of `rank` holds.
    pub fn range(&self, rank: usize) -> Range<usize> {
        let each = self.each();
        (rank * each).min(self.len)..((rank + 1) * each).min(self.len)
    }
}

/// What is kept in files instead of memory, for models that the memory does not hold. This process has pages of it in memory
/// only while it works on them: of moments, those of one unit at a time, or less.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Offload {
    /// Nothing.
    #[default]
    None,
    /// Optimizer state.
    Optimizer,
    /// Optimizer state, the slices of weights in stage 3, and the weights of models that are not trained but for those in 8
    /// bits; of whole ones a pass reads each unit when it comes to it.
    All,
}

/// Numbers in memory, or in a file that the system maps into memory and writes back as it needs the room.
#[derive(Debug)]
pub enum SliceBuffer {
    /// In memory.
    Memory(Vec<f32>),
    /// In a file without a name, which is gone when the process ends.
    File(MmapMut),
}

impl SliceBuffer {
    /// `len` zeros, in memory or in a file in `dir`.
    ///
    /// # Errors
    /// If the file cannot be made.
    pub fn zeros(len: usize, dir: Option<&Path>) -> Result<Self> {
        let Some(dir) = dir.filter(|_| len > 0) else { return Ok(Self::Memory(vec![0.0; len])) };
        let failed = |source| Error::Io { path: dir.to_path_buf(), source };
        std::fs::create_dir_all(dir).map_err(failed)?;
        let file = tempfile::tempfile_in(dir).map_err(failed)?;
        file.set_len(4 * len as u64).map_err(failed)?;
        // SAFETY: the file has no name, so no other process can change or shorten it.
        let map = unsafe { MmapMut::map_mut(&file) }.map_err(failed)?;
        Ok(Self::File(map))
    }

    /// The numbers `values`, in memory or in a file in `dir`.
    ///
    /// # Errors
    /// If the file cannot be made.
    pub fn of(values: Vec<f32>, dir: Option<&Path>) -> Result<Self> {
        if dir.is_none() {
            return Ok(Self::Memory(values));
        }
        let mut buffer = Self::zeros(values.len(), dir)?;
        buffer.copy_from_slice(&values);
        buffer.let_go();
        Ok(buffer)
    }

    /// Says that the numbers are not needed for a while. The pages of a file that were touched leave this process; what was
    /// written to them is the system's to bring to the disk, and the next access maps them again. Numbers in memory stay.
    pub fn let_go(&self) {
        #[cfg(unix)]
        if let Self::File(map) = self {
            // SAFETY: the mapping is shared, so what was written to it stays with the file. A refusal costs memory, no more.
            let _ = unsafe { map.unchecked_advise(UncheckedAdvice::DontNeed) };
        }
    }
}

impl std::ops::Deref for SliceBuffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        match self {
            Self::Memory(values) => values,
            // SAFETY: a mapping begins at a page, its length is a multiple of four, and every pattern of bits is an f32.
            Self::File(map) => unsafe { std::slice::from_raw_parts(map.as_ptr().cast(), map.len() / 4) },
        }
    }
}

impl std::ops::DerefMut for SliceBuffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        match self {
            Self::Memory(values) => values,
            // SAFETY: as above, and the mapping is borrowed for writing.
            Self::File(map) => unsafe { std::slice::from_raw_parts_mut(map.as_mut_ptr().cast(), map.len() / 4) },
        }
    }
}

impl AsRef<[f32]> for SliceBuffer {
    fn as_ref(&self) -> &[f32] {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_cover_a_buffer_once() {
        for (len, ranks) in [(5000, 2), (5000, 4), (100, 4), (1024, 1), (4096, 4), (0, 2)] {
            let slicing = Slicing { len, ranks };
            let mut next = 0;
            for rank in 0..ranks {
                let range = slicing.range(rank);
                assert!(range.start == next && range.len() <= slicing.each());
                assert!(ranks == 1 || range.is_empty() || range.start.is_multiple_of(BLOCK_ELEMENTS));
                next = range.end;
            }
            assert_eq!(next, len);
            assert!(slicing.padded() >= len);
        }
    }

    #[test]
    fn a_file_holds_what_memory_holds() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = SliceBuffer::of(vec![1.5; 3000], Some(dir.path())).unwrap();
        file[2999] = -2.0;
        assert!(matches!(file, SliceBuffer::File(_)));
        assert_eq!((file.len(), file[0], file[2999]), (3000, 1.5, -2.0));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "the file has no name");
    }

    /// KiB of the buffer's mapping that this process has in memory.
    #[cfg(target_os = "linux")]
    fn resident_kib(buffer: &SliceBuffer) -> usize {
        let start = format!("{:x}-", buffer.as_ptr().addr());
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut lines = maps.lines().skip_while(|line| !line.starts_with(&start));
        let line = lines.find_map(|line| line.strip_prefix("Rss:")).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn what_is_let_go_of_leaves_the_process_and_keeps_its_numbers() {
        let (dir, len) = (tempfile::tempdir().unwrap(), 1 << 20);
        let values: Vec<f32> = (0..len).map(|index| index as f32).collect();
        let mut buffer = SliceBuffer::of(values.clone(), Some(dir.path())).unwrap();
        assert_eq!(resident_kib(&buffer), 0, "written, and not needed yet");
        for round in 1..4 {
            buffer.iter_mut().for_each(|value| *value += 1.0);
            assert_eq!(resident_kib(&buffer), 4 << 10, "all of it was touched");
            buffer.let_go();
            assert_eq!(resident_kib(&buffer), 0);
            assert!(buffer.iter().zip(&values).all(|(now, value)| *now == value + round as f32));
        }
        let memory = SliceBuffer::of(values.clone(), None).unwrap();
        memory.let_go();
        assert!(memory[..] == values);
    }
}
