//! How a rank is doing, as told to the others.

/// The state of one rank at a safe point, from best to worst. [`agree`](crate::Collective::agree) tells all ranks the
/// worst, so that they stop together, or skip a step together, or not at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Status {
    /// Go on.
    Healthy,
    /// A loss or gradient is not finite: skip this optimizer step on every rank.
    SkipStep,
    /// The run was asked to stop: save and leave.
    Stop,
    /// This rank cannot go on.
    Failed,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_is_the_greatest() {
        assert!(Status::Healthy < Status::SkipStep);
        assert!(Status::SkipStep < Status::Stop);
        assert!(Status::Stop < Status::Failed);
    }
}
