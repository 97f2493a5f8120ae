//! Adding up one unit's gradient over the lanes and rounds of one rank.

use tandem_kernels::reduce::add_slice;

use crate::Result;

/// What has been added up of this rank's slice of one unit.
#[derive(Debug, Default)]
pub(super) struct Sums {
    /// Complete subtrees over this rank's lanes: (height, sum).
    pub(super) tree: Vec<(u32, Vec<f32>)>,
    pub(super) total: Vec<f32>,
    pub(super) filled: bool,
}

impl Sums {
    /// Takes in the sum over the ranks of one lane each; `fill` writes it.
    pub(super) fn absorb(&mut self, lanes: usize, fill: impl FnOnce(&mut [f32]) -> Result<()>) -> Result<()> {
        if lanes == 1 && !self.filled {
            self.filled = true;
            return fill(&mut self.total);
        }
        let mut sum = vec![0f32; self.total.len()];
        fill(&mut sum)?;
        let mut height = 0;
        while let Some((_, earlier)) = self.tree.pop_if(|(other, _)| *other == height) {
            let mut joined = earlier;
            add_slice(&mut joined, &sum)?;
            sum = joined;
            height += 1;
        }
        if height < lanes.trailing_zeros() {
            self.tree.push((height, sum));
        } else if self.filled {
            add_slice(&mut self.total, &sum)?;
        } else {
            self.total = sum;
            self.filled = true;
        }
        Ok(())
    }
}
