//! Where the time goes: seconds, calls and arithmetic of each class of kernels, counted while it is switched on.
//!
//! A kernel runs on all threads of its rank; its time is that from its call to its return. With several ranks in one process
//! the times of all ranks add up.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A class of kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Class {
    /// Linear maps forward, in training, scoring and reading prompts.
    Linear,
    /// Gradients of their inputs.
    InputGradient,
    /// Gradients of their weights and biases.
    WeightGradient,
    /// Linear maps and head with packed matrices: decoding.
    Decode,
    /// Attention forward.
    Attention,
    /// Attention backward.
    AttentionBackward,
    /// Attention of single rows against the cache.
    AttentionDecode,
    /// Log-probabilities of the head.
    Head,
    /// Their backward.
    HeadBackward,
    /// Norms, forward and backward.
    Norm,
    /// Activations, forward and backward.
    Mlp,
    /// Rotary positions, embeddings and dropout.
    Rows,
    /// Choosing tokens.
    Sample,
    /// Optimizer and averages.
    Optimizer,
}

impl Class {
    /// All classes.
    pub const ALL: [Class; 14] = [
        Class::Linear,
        Class::InputGradient,
        Class::WeightGradient,
        Class::Decode,
        Class::Attention,
        Class::AttentionBackward,
        Class::AttentionDecode,
        Class::Head,
        Class::HeadBackward,
        Class::Norm,
        Class::Mlp,
        Class::Rows,
        Class::Sample,
        Class::Optimizer,
    ];

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Class::Linear => "linear maps",
            Class::InputGradient => "linear maps, gradients of inputs",
            Class::WeightGradient => "linear maps, gradients of weights",
            Class::Decode => "linear maps, decoding",
            Class::Attention => "attention",
            Class::AttentionBackward => "attention, backward",
            Class::AttentionDecode => "attention, decoding",
            Class::Head => "head",
            Class::HeadBackward => "head, backward",
            Class::Norm => "norms",
            Class::Mlp => "activations",
            Class::Rows => "positions, embeddings, dropout",
            Class::Sample => "choosing tokens",
            Class::Optimizer => "optimizer",
        }
    }
}

/// What was counted of one class.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counted {
    /// Time of all calls.
    pub elapsed: Duration,
    /// Calls.
    pub calls: u64,
    /// Additions and multiplications of matrix products; 0 where they do not say much.
    pub operations: u64,
}

struct Counter {
    nanos: AtomicU64,
    calls: AtomicU64,
    operations: AtomicU64,
}

static IS_ON: AtomicBool = AtomicBool::new(false);
static COUNTERS: [Counter; Class::ALL.len()] =
    [const { Counter { nanos: AtomicU64::new(0), calls: AtomicU64::new(0), operations: AtomicU64::new(0) } };
        Class::ALL.len()];

/// Counts from now on, or no longer.
pub fn switch(is_on: bool) {
    IS_ON.store(is_on, Ordering::Relaxed);
}

/// Whether anything is counted.
pub fn is_on() -> bool {
    IS_ON.load(Ordering::Relaxed)
}

/// What was counted since the last call, by class; starts again from zero.
pub fn take() -> Vec<(Class, Counted)> {
    let counted = |class: Class| {
        let counter = &COUNTERS[class as usize];
        let take = |number: &AtomicU64| number.swap(0, Ordering::Relaxed);
        let elapsed = Duration::from_nanos(take(&counter.nanos));
        (class, Counted { elapsed, calls: take(&counter.calls), operations: take(&counter.operations) })
    };
    Class::ALL.map(counted).to_vec()
}

/// Counts the time until it is dropped.
#[must_use]
pub(crate) struct Timer(Option<(Class, u64, Instant)>);

/// A kernel of `class` begins, with this many operations.
#[inline]
pub(crate) fn time(class: Class, operations: usize) -> Timer {
    Timer(is_on().then(|| (class, operations as u64, Instant::now())))
}

impl Drop for Timer {
    fn drop(&mut self) {
        if let Some((class, operations, start)) = self.0 {
            let counter = &COUNTERS[class as usize];
            counter.nanos.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
            counter.calls.fetch_add(1, Ordering::Relaxed);
            counter.operations.fetch_add(operations, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_only_while_it_is_on() {
        drop(time(Class::Sample, 7));
        assert_eq!(take()[Class::Sample as usize].1, Counted::default());
        switch(true);
        let timer = time(Class::Sample, 7);
        std::thread::sleep(Duration::from_millis(2));
        drop(timer);
        switch(false);
        let (class, counted) = take()[Class::Sample as usize];
        assert_eq!((class, counted.calls, counted.operations), (Class::Sample, 1, 7));
        assert!(counted.elapsed >= Duration::from_millis(2));
        assert_eq!(take()[Class::Sample as usize].1, Counted::default());
    }

    #[test]
    fn classes_are_listed_in_their_order() {
        assert!(Class::ALL.iter().enumerate().all(|(index, class)| *class as usize == index));
    }
}
