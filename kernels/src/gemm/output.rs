//! The output of a product, as tasks see it that each write their own rectangle.

use std::marker::PhantomData;

/// Elements that a product will write; they need not be initialised.
pub(crate) struct Output<'a, E> {
    start: *mut E,
    len: usize,
    lifetime: PhantomData<&'a mut [E]>,
}

// SAFETY: an exclusive borrow; tasks write disjoint rectangles.
unsafe impl<E: Send> Send for Output<'_, E> {}
// SAFETY: as above.
unsafe impl<E: Send> Sync for Output<'_, E> {}

impl<'a, E: Copy> Output<'a, E> {
    /// Elements that hold values.
    pub(crate) fn new(values: &'a mut [E]) -> Self {
        Self { start: values.as_mut_ptr(), len: values.len(), lifetime: PhantomData }
    }

    /// The first element. Writing through it is up to the tasks, none of which may write what another does.
    pub(crate) fn start(&self) -> *mut E {
        self.start
    }

    /// Elements.
    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

/// A vector of `len` elements that `write` fills: without zeroing memory that is about to be overwritten.
///
/// # Safety
/// `write` must write all elements, and read none before.
pub(crate) unsafe fn filled<E: Copy>(len: usize, write: impl FnOnce(Output<'_, E>)) -> Vec<E> {
    let mut values = Vec::with_capacity(len);
    write(Output { start: values.as_mut_ptr(), len, lifetime: PhantomData });
    // SAFETY: the capacity is there, and the caller vouches for the elements.
    unsafe { values.set_len(len) };
    values
}
