//! What a thread of ranks keeps while it works.

use std::sync::Arc;

use crate::collective::Collective;

/// Aborts the world if it is dropped by a panic, so that the peers of a rank that panics need not wait for the deadline.
///
/// Make one at the top of a rank's work; it does nothing in a world that ends well.
#[derive(Debug)]
pub struct AbortOnPanic(Arc<dyn Collective>);

impl AbortOnPanic {
    /// Guards `world`.
    pub fn new(world: &Arc<dyn Collective>) -> Self {
        Self(Arc::clone(world))
    }
}

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.abort("its thread panicked");
        }
    }
}
