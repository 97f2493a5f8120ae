//! One NCCL communicator and its stream: calls that do not block, waits that have a deadline.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cudarc::driver::{CudaContext, CudaStream};
use cudarc::nccl::result::{self, NcclError, NcclStatus};
use cudarc::nccl::sys;

use super::library::{cuda_error, nccl_error, non_blocking};
use crate::collective::Collective;
use crate::error::{Error, Result};
use crate::tag::Tag;
use crate::work::Work;

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How long a communicator that is dropped waits for its peers to drop theirs.
const LEAVE_PATIENCE: Duration = Duration::from_secs(10);

/// What all communicators of one world share.
pub(super) struct Fate {
    /// The rank in the world.
    pub(super) rank: usize,
    pub(super) deadline: Duration,
    control: Arc<dyn Collective>,
    failure: Mutex<Option<Error>>,
    /// An operation of this rank alone, long complete: asking for it tells whether the control world has failed.
    pulse: Mutex<Work>,
}

impl Fate {
    /// Collective: all ranks of `control` make one.
    pub(super) fn new(control: &Arc<dyn Collective>) -> Result<Arc<Self>> {
        let tag = Tag::new("nccl pulse", 0);
        let rank = control.rank();
        let Some(alone) = control.split(tag, Some(rank), 0)? else {
            return Err(Error::Launch("the control communicator gave no group of one".into()));
        };
        let pulse = Mutex::new(alone.start_all_gather_f32(tag, Arc::new(vec![0.0_f32]))?);
        let (control, deadline) = (Arc::clone(control), control.deadline());
        Ok(Arc::new(Self { rank, deadline, control, failure: Mutex::default(), pulse }))
    }

    pub(super) fn check(&self) -> Result<()> {
        if let Some(error) = lock(&self.failure).clone() {
            return Err(error);
        }
        lock(&self.pulse).is_ready().map_err(|error| self.fail(error))?;
        Ok(())
    }

    /// Remembers the first error, and tells the peers: they may be waiting on their GPUs, where nothing else reaches them.
    pub(super) fn fail(&self, error: Error) -> Error {
        let first = lock(&self.failure).get_or_insert(error).clone();
        self.control.abort(&first.to_string());
        first
    }

    /// Looks until `look` has something. A missing peer cannot be named: NCCL does not know who it waits for.
    pub(super) fn poll<T>(&self, tag: Tag, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
        let since = Instant::now();
        for turn in 0_u64.. {
            if let Some(found) = look().map_err(|error| self.fail(error))? {
                return Ok(found);
            }
            if turn < 200 {
                std::hint::spin_loop();
                continue;
            }
            self.check()?;
            if since.elapsed() >= self.deadline {
                break;
            }
            if turn < 2000 {
                std::thread::yield_now();
            } else {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        let (rank, deadline) = (self.rank, self.deadline);
        Err(self.fail(Error::Timeout { rank, tag, deadline, missing: Vec::new() }))
    }
}

/// NCCL's handle. Null after an abort.
struct Raw(sys::ncclComm_t);

// SAFETY: NCCL allows any thread to use a communicator if one does at a time, which the mutex around it sees to.
unsafe impl Send for Raw {}

pub(super) struct Channel {
    fate: Arc<Fate>,
    raw: Mutex<Raw>,
    stream: Arc<CudaStream>,
}

impl Channel {
    /// Joins the communicator that `id` names. Collective.
    pub(super) fn join(
        fate: Arc<Fate>,
        context: &Arc<CudaContext>,
        rank: usize,
        world: usize,
        id: sys::ncclUniqueId,
    ) -> Result<Self> {
        let failed = |error| fate.fail(cuda_error(fate.rank, error));
        let stream = context.new_stream().map_err(failed)?;
        context.bind_to_thread().map_err(failed)?;
        let mut raw = std::ptr::null_mut();
        let mut config = non_blocking();
        // SAFETY: both pointers are valid for the call; NCCL copies the configuration.
        let begun = unsafe { result::comm_init_rank_config(&mut raw, world as i32, id, rank as i32, &mut config) };
        begun.map_err(|error| fate.fail(nccl_error(fate.rank, &error)))?;
        let channel = Self { fate, raw: Mutex::new(Raw(raw)), stream };
        channel.settle(Tag::new("nccl join", 0))?;
        Ok(channel)
    }

    /// Cuts the communicator. Collective.
    pub(super) fn split(&self, tag: Tag, color: Option<usize>, key: usize) -> Result<Option<Self>> {
        /// NCCL's word for "none".
        const NO_COLOR: i32 = -1;
        let stream = self.stream.context().new_stream().map_err(|error| self.cuda_error(error))?;
        let color = color.map_or(NO_COLOR, |color| color as i32);
        // NCCL may still write to it after a deadline has passed, so it is never freed: a few bytes for each split.
        let new: &'static mut _ = Box::leak(Box::new((std::ptr::null_mut(), non_blocking())));
        // SAFETY: both pointers are valid for ever.
        let call = |comm, _| unsafe { sys::ncclCommSplit(comm, color, key as i32, &mut new.0, &mut new.1).result() };
        self.issue(tag, call)?;
        let raw = new.0;
        if color == NO_COLOR {
            return Ok(None);
        }
        let channel = Self { fate: Arc::clone(&self.fate), raw: Mutex::new(Raw(raw)), stream };
        channel.settle(tag)?;
        Ok(Some(channel))
    }

    pub(super) fn fate(&self) -> &Arc<Fate> {
        &self.fate
    }

    pub(super) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    pub(super) fn cuda_error(&self, error: cudarc::driver::DriverError) -> Error {
        self.fate.fail(cuda_error(self.fate.rank, error))
    }

    /// Puts work on the stream: `call` gets the communicator and the stream. Returns when the GPU has the work, which then
    /// goes on by itself.
    pub(super) fn issue(
        &self,
        tag: Tag,
        call: impl FnOnce(sys::ncclComm_t, sys::cudaStream_t) -> std::result::Result<NcclStatus, NcclError>,
    ) -> Result<()> {
        self.fate.check()?;
        self.stream.context().bind_to_thread().map_err(|error| self.cuda_error(error))?;
        {
            let raw = lock(&self.raw);
            self.alive(&raw)?;
            call(raw.0, self.stream.cu_stream().cast())
                .map_err(|error| self.fate.fail(nccl_error(self.fate.rank, &error)))?;
        }
        self.settle(tag)
    }

    /// Waits until all work on the stream is done.
    pub(super) fn wait(&self, tag: Tag) -> Result<()> {
        let event = self.stream.record_event(None).map_err(|error| self.cuda_error(error))?;
        let ended = self.fate.poll(tag, || {
            self.state()?;
            let done = event.try_is_complete().map_err(|error| cuda_error(self.fate.rank, error))?;
            Ok(done.then_some(()))
        });
        self.end_if_failed(ended)
    }

    /// Waits until NCCL has taken the last call.
    fn settle(&self, tag: Tag) -> Result<()> {
        let ended = self.fate.poll(tag, || Ok(self.state()?.then_some(())));
        self.end_if_failed(ended)
    }

    /// True if NCCL is ready for the next call; an error of the communicator is one here.
    fn state(&self) -> Result<bool> {
        let raw = lock(&self.raw);
        self.alive(&raw)?;
        let mut state = sys::ncclResult_t::ncclSuccess;
        // SAFETY: a communicator that was not aborted.
        let asked = unsafe { sys::ncclCommGetAsyncError(raw.0, &mut state) };
        for answer in [asked.result(), state.result()] {
            match answer {
                Ok(NcclStatus::InProgress) => return Ok(false),
                Ok(_) => {}
                Err(error) => return Err(nccl_error(self.fate.rank, &error)),
            }
        }
        Ok(true)
    }

    fn alive(&self, raw: &Raw) -> Result<()> {
        if raw.0.is_null() {
            // It was aborted because of this error.
            self.fate.check()?;
            return Err(Error::Launch("the NCCL communicator has ended".into()));
        }
        Ok(())
    }

    fn end_if_failed<T>(&self, ended: Result<T>) -> Result<T> {
        if ended.is_err() {
            self.end();
        }
        ended
    }

    /// Takes the work back from the GPU: kernels that wait for a peer would wait for ever.
    pub(super) fn end(&self) {
        let mut raw = lock(&self.raw);
        if !raw.0.is_null() {
            // SAFETY: a communicator that was not aborted; it is not used again. There is nobody to tell about an error.
            let _ = unsafe { result::comm_abort(raw.0) };
            raw.0 = std::ptr::null_mut();
        }
    }
}

impl Channel {
    /// Leaves in good order: peers may still be reading what this rank has sent.
    fn leave(&self) -> Result<()> {
        let started = {
            let raw = lock(&self.raw);
            self.alive(&raw)?;
            // SAFETY: a communicator that was not aborted.
            unsafe { result::comm_finalize(raw.0) }
        };
        started.map_err(|error| nccl_error(self.fate.rank, &error))?;
        let until = Instant::now() + LEAVE_PATIENCE;
        while !self.state()? {
            if Instant::now() >= until {
                return Ok(());
            }
            std::thread::yield_now();
        }
        let mut raw = lock(&self.raw);
        // SAFETY: finalized, and not used again.
        let destroyed = unsafe { result::comm_destroy(raw.0) };
        raw.0 = std::ptr::null_mut();
        destroyed.map(drop).map_err(|error| nccl_error(self.fate.rank, &error))
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        let healthy = self.fate.check().is_ok() && !lock(&self.raw).0.is_null();
        // There is nobody to tell about an error; what could not leave in good order is aborted.
        if healthy && self.wait(Tag::new("nccl leave", 0)).is_ok() {
            let _ = self.leave();
        }
        self.end();
    }
}
