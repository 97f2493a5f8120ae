//! What all communicators of this process share: its failure, notices from peers, buffers, and operations under way.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::library::{Comm, Memory, Receive, Sending};
use super::pool::Pool;
use super::stage::{Advance, Stage};
use crate::error::{Error, Result};

/// The longest notice that [`Process::abort`] sends.
const NOTICE_BYTES: usize = 1024;
/// How long an aborting rank tries to get its notices out.
const NOTICE_PATIENCE: Duration = Duration::from_secs(1);

/// Sends in the outbox above which it is looked through at every call.
const OUTBOX_LOOK: usize = 64;

/// One process of the job.
pub(super) struct Process {
    rank: usize,
    world: usize,
    deadline: Duration,
    /// Only notices go over it, so that one receive from anyone is always open.
    notices: Comm,
    notice: Mutex<Option<Receive>>,
    failed: AtomicBool,
    failure: Mutex<Option<Error>>,
    told: AtomicBool,
    pool: Arc<Pool>,
    /// Sends that nobody waits for any more.
    outbox: Mutex<Vec<Sending>>,
    /// Non-blocking operations, driven by whichever call is waiting.
    under_way: Mutex<Vec<Arc<Mutex<dyn Stage + Send>>>>,
}

pub(super) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Process {
    pub(super) fn new(rank: usize, world: usize, deadline: Duration, notices: Comm) -> Result<Self> {
        let pool = Arc::new(Pool::default());
        let notice = notices.start_receive(pool.get(NOTICE_BYTES), None, 0)?;
        Ok(Self {
            rank,
            world,
            deadline,
            notices,
            notice: Mutex::new(Some(notice)),
            failed: AtomicBool::new(false),
            failure: Mutex::new(None),
            told: AtomicBool::new(false),
            pool,
            outbox: Mutex::default(),
            under_way: Mutex::default(),
        })
    }

    pub(super) fn rank(&self) -> usize {
        self.rank
    }

    pub(super) fn deadline(&self) -> Duration {
        self.deadline
    }

    pub(super) fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Fails if this process has failed before, or if a peer has said that it has.
    pub(super) fn check(&self) -> Result<()> {
        if !self.failed.load(Ordering::Acquire) {
            self.listen()?;
        }
        if self.failed.load(Ordering::Acquire)
            && let Some(error) = lock(&self.failure).clone()
        {
            return Err(error);
        }
        Ok(())
    }

    /// Remembers `error` as the reason why nothing works any more, unless there is one, and returns the reason.
    pub(super) fn fail(&self, error: Error) -> Error {
        let error = lock(&self.failure).get_or_insert(error).clone();
        self.failed.store(true, Ordering::Release);
        error
    }

    /// Looks whether a peer has sent a notice.
    fn listen(&self) -> Result<()> {
        // Whoever holds it is looking.
        let Ok(mut notice) = self.notice.try_lock() else { return Ok(()) };
        let Some(open) = notice.as_mut() else { return Ok(()) };
        if !open.test().map_err(|error| self.fail(error))? {
            return Ok(());
        }
        if let Some(done) = notice.take() {
            let chunk = done.take();
            let bytes = chunk.bytes();
            let peer = bytes.first_chunk().map_or(0, |rank| u32::from_le_bytes(*rank) as usize);
            let why = String::from_utf8_lossy(bytes.get(4..).unwrap_or_default()).into_owned();
            self.fail(Error::PeerFailed { rank: self.rank, peer, why });
        }
        Ok(())
    }

    /// Moves along what nobody waits for at the moment: notices, old sends, operations under way.
    pub(super) fn progress(&self) -> Result<()> {
        self.check()?;
        self.reap().map_err(|error| self.fail(error))?;
        let stages = lock(&self.under_way).clone();
        let mut done = false;
        for stage in &stages {
            // A stage that is locked is being driven by its own waiter.
            let Ok(mut stage) = stage.try_lock() else { continue };
            done |= matches!(stage.advance().map_err(|error| self.fail(error))?, Advance::Done);
        }
        if done {
            lock(&self.under_way).retain(|stage| stage.try_lock().map_or(true, |stage| !stage.is_done()));
        }
        Ok(())
    }

    /// Drives `stage` from now on whenever any call waits.
    pub(super) fn adopt(&self, stage: Arc<Mutex<dyn Stage + Send>>) {
        lock(&self.under_way).push(stage);
    }

    /// Forgets a stage that its owner has seen to the end.
    pub(super) fn release(&self, stage: &Arc<Mutex<impl Stage + Send + 'static>>) {
        let done = Arc::as_ptr(stage).cast::<()>();
        lock(&self.under_way).retain(|other| Arc::as_ptr(other).cast::<()>() != done);
    }

    /// Keeps sends until they are done.
    pub(super) fn park(&self, sends: impl IntoIterator<Item = Sending>) {
        let mut outbox = lock(&self.outbox);
        outbox.extend(sends);
        if outbox.len() > OUTBOX_LOOK {
            // An error of an old send shows again where somebody waits.
            outbox.retain_mut(|send| !send.test().unwrap_or(false));
        }
    }

    fn reap(&self) -> Result<()> {
        let Ok(mut outbox) = self.outbox.try_lock() else { return Ok(()) };
        let mut at = 0;
        while at < outbox.len() {
            if outbox[at].test()? {
                outbox.swap_remove(at);
            } else {
                at += 1;
            }
        }
        Ok(())
    }

    /// Waits up to the deadline until everything has left; names who does not take it.
    pub(super) fn drain(&self) -> Result<()> {
        let until = Instant::now() + self.deadline;
        loop {
            self.progress()?;
            let idle = lock(&self.outbox).is_empty() && lock(&self.under_way).is_empty();
            if idle {
                return Ok(());
            }
            if Instant::now() >= until {
                let tag = crate::tag::Tag::new("finish", 0);
                let mut missing: Vec<usize> = lock(&self.outbox).iter().map(Sending::to).collect();
                missing.sort_unstable();
                missing.dedup();
                return Err(self.fail(Error::Timeout { rank: self.rank, tag, deadline: self.deadline, missing }));
            }
            std::thread::yield_now();
        }
    }

    /// Tells every peer, once, that this rank has failed. Best effort.
    pub(super) fn abort(&self, why: &str) {
        self.fail(Error::PeerFailed { rank: self.rank, peer: self.rank, why: why.to_owned() });
        if self.told.swap(true, Ordering::AcqRel) {
            return;
        }
        let mut kept = why.len().min(NOTICE_BYTES - 4);
        while !why.is_char_boundary(kept) {
            kept -= 1;
        }
        let mut message = (self.rank as u32).to_le_bytes().to_vec();
        message.extend_from_slice(&why.as_bytes()[..kept]);
        let message = Arc::new(message);
        let mut sends = Vec::new();
        for peer in (0..self.world).filter(|&peer| peer != self.rank) {
            let memory = Memory::Message { _message: Arc::clone(&message) };
            // SAFETY: the memory owns the bytes, which nobody changes.
            let send = unsafe { self.notices.start_send(&message, memory, peer, 0) };
            // Nothing can be done about a notice that does not go out.
            sends.extend(send.ok());
        }
        let until = Instant::now() + NOTICE_PATIENCE;
        while !sends.is_empty() && Instant::now() < until {
            sends.retain_mut(|send| !send.test().unwrap_or(true));
            std::thread::yield_now();
        }
        self.park(sends);
    }

    /// Stops listening, so that MPI can be finalized.
    pub(super) fn close(&self) -> Result<()> {
        lock(&self.notice).take().map_or(Ok(()), Receive::cancel)
    }
}
