//! A world of one: every reduction is already done.

use std::time::Duration;

use crate::collective::Collective;
use crate::error::{Error, Result};
use crate::status::Status;
use crate::tag::Tag;

/// The default backend: one rank, no peers, nothing to wait for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Solo;

impl Collective for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn world(&self) -> usize {
        1
    }

    fn deadline(&self) -> Duration {
        Duration::ZERO
    }

    fn all_reduce_sum_f32(&self, _tag: Tag, _values: &mut [f32]) -> Result<()> {
        Ok(())
    }

    fn all_reduce_sum_f64(&self, _tag: Tag, _values: &mut [f64]) -> Result<()> {
        Ok(())
    }

    fn all_reduce_max_f64(&self, _tag: Tag, _values: &mut [f64]) -> Result<()> {
        Ok(())
    }

    fn broadcast(&self, tag: Tag, _bytes: &mut [u8], root: usize) -> Result<()> {
        if root == 0 { Ok(()) } else { Err(Error::NoSuchRank { tag, root, world: 1 }) }
    }

    fn barrier(&self, _tag: Tag) -> Result<()> {
        Ok(())
    }

    fn agree(&self, _tag: Tag, status: Status) -> Result<Status> {
        Ok(status)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TAG: Tag = Tag::new("test", 3);

    #[test]
    fn one_rank_keeps_what_it_has() {
        let world: &dyn Collective = &Solo;
        assert_eq!((world.rank(), world.world()), (0, 1));
        let mut values = [1.5, f32::NAN];
        world.all_reduce_sum_f32(TAG, &mut values).unwrap();
        assert_eq!(values[0], 1.5);
        assert!(values[1].is_nan());
        let mut bytes = *b"abc";
        world.broadcast(TAG, &mut bytes, 0).unwrap();
        assert_eq!(&bytes, b"abc");
        world.barrier(TAG).unwrap();
        for status in [Status::Healthy, Status::SkipStep, Status::Stop, Status::Failed] {
            assert_eq!(world.agree(TAG, status).unwrap(), status);
        }
    }

    #[test]
    fn a_root_outside_the_world_is_refused() {
        let error = Solo.broadcast(TAG, &mut [], 1).unwrap_err();
        assert_eq!(error.to_string(), "test[3]: rank 1 does not exist in a world of 1");
    }
}
