//! Adding up what the pieces of a model contribute to a row: over the pieces held here, then over the ranks that share them.

use candle_core::Tensor;
use tandem_kernels::reduce::add_slice;
use tandem_kernels::slice::{with_slice, with_slice_mut};

use crate::Result;
use crate::parallel::Group;

/// The sum of `parts`, one for each piece held here, and of what the other ranks of `group` hold.
///
/// The order is that of a binary tree over all pieces, cut at powers of two, of which a rank's pieces are a subtree.
pub(super) fn sum(parts: Vec<Tensor>, group: &Group, site: &'static str) -> Result<Tensor> {
    let total = tree(parts)?;
    group.all_reduce(site, &total)?;
    Ok(total)
}

/// The sum of at least one part, in the first part's place.
fn tree(mut parts: Vec<Tensor>) -> Result<Tensor> {
    while parts.len() > 1 {
        let later = parts.split_off(parts.len().next_power_of_two() / 2);
        let (earlier, later) = (tree(parts)?, tree(later)?);
        with_slice(&later, |terms| with_slice_mut(&earlier, |total| add_slice(total, terms)))???;
        parts = vec![earlier];
    }
    parts.pop().ok_or_else(|| crate::Error::Mesh("a rank holds no piece of the model".into()))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn parts_are_added_in_a_tree() {
        // In this order only is nothing lost: (1e8 − 1e8) + (1 + 1).
        let parts = [1e8f32, -1e8, 1.0, 1.0].map(|value| Tensor::new(&[value], &Device::Cpu).unwrap());
        let total = sum(parts.to_vec(), &Group::solo(), "test").unwrap();
        assert_eq!(total.to_vec1::<f32>().unwrap(), [2.0]);
    }
}
