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

impl Status {
    /// A number for the wire; a worse status has a greater one.
    pub fn code(self) -> u8 {
        self as u8
    }

    /// The status of a [`Self::code`]. An unknown code is [`Self::Failed`]: whoever sent it does not speak as we do.
    pub fn from_code(code: u8) -> Self {
        [Self::Healthy, Self::SkipStep, Self::Stop].get(usize::from(code)).copied().unwrap_or(Self::Failed)
    }
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

    #[test]
    fn codes_come_back() {
        for status in [Status::Healthy, Status::SkipStep, Status::Stop, Status::Failed] {
            assert_eq!(Status::from_code(status.code()), status);
        }
        assert_eq!(Status::from_code(200), Status::Failed);
    }
}
