//! The MPI library: the few calls that are used, each with its return code looked at, and requests that own their memory.
//!
//! Every data call is non-blocking. A request owns the memory that MPI reads or writes; if it is dropped before MPI is
//! done with it, the memory is leaked on purpose, because MPI may still touch it.

use std::ffi::{c_char, c_int};
use std::mem::{ManuallyDrop, MaybeUninit};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use ::mpi::ffi;

use super::pool::Chunk;
use crate::error::{Error, Result};
use crate::work::Shared;

/// The rank of this process in the world, for error messages.
static WORLD_RANK: AtomicUsize = AtomicUsize::new(0);

/// Answers an error for every return code but success.
pub(super) fn check(code: c_int) -> Result<()> {
    if code == ffi::MPI_SUCCESS as c_int {
        return Ok(());
    }
    let mut text = [0 as c_char; ffi::MPI_MAX_ERROR_STRING as usize + 1];
    let mut length = 0;
    // SAFETY: the buffer has the size that MPI asks for.
    unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr(), &mut length) };
    let text = to_text(&text, length);
    Err(Error::Backend { rank: WORLD_RANK.load(Ordering::Relaxed), library: "MPI", code: code.into(), text })
}

fn to_text(buffer: &[c_char], length: c_int) -> String {
    let bytes: Vec<u8> = buffer.iter().take(length.max(0) as usize).map(|&byte| byte as u8).collect();
    String::from_utf8_lossy(&bytes).trim_end().to_owned()
}

/// Starts MPI with threads allowed everywhere. Called once per process.
pub(super) fn initialize() -> Result<Comm> {
    let mut provided = 0;
    // SAFETY: null arguments are allowed since MPI 2; the caller makes sure that this is the first call.
    check(unsafe { ffi::MPI_Init_thread(ptr::null_mut(), ptr::null_mut(), multiple(), &mut provided) })?;
    if provided < multiple() {
        return Err(Error::Launch(format!(
            "this MPI library grants thread level {provided}, but MPI_THREAD_MULTIPLE ({}) is needed",
            multiple()
        )));
    }
    // SAFETY: MPI is initialized.
    let world = unsafe { Comm(ffi::RSMPI_COMM_WORLD) };
    world.return_errors()?;
    WORLD_RANK.store(world.rank()?, Ordering::Relaxed);
    Ok(world)
}

fn multiple() -> c_int {
    // SAFETY: a constant of the library.
    unsafe { ffi::RSMPI_THREAD_MULTIPLE }
}

/// True between a successful [`initialize`] and [`finalize`], whoever called it.
pub(super) fn is_running() -> bool {
    let (mut started, mut ended) = (0, 0);
    // SAFETY: both may be called at any time.
    let codes = unsafe { (ffi::MPI_Initialized(&mut started), ffi::MPI_Finalized(&mut ended)) };
    codes == (0, 0) && started != 0 && ended == 0
}

/// Ends MPI. Blocks until all ranks come here, so only call it after a barrier.
pub(super) fn finalize() -> Result<()> {
    // SAFETY: MPI is running; the caller has no request left that will be tested again.
    check(unsafe { ffi::MPI_Finalize() })
}

/// Ends the whole job at once.
pub(super) fn abort_job(code: i32) {
    if is_running() {
        // SAFETY: MPI is running; on return nothing more is asked of it.
        unsafe { ffi::MPI_Abort(ffi::RSMPI_COMM_WORLD, code) };
    }
}

/// The name of this machine as MPI knows it.
pub(super) fn machine() -> Result<String> {
    let mut name = [0 as c_char; ffi::MPI_MAX_PROCESSOR_NAME as usize + 1];
    let mut length = 0;
    // SAFETY: the buffer has the size that MPI asks for.
    check(unsafe { ffi::MPI_Get_processor_name(name.as_mut_ptr(), &mut length) })?;
    Ok(to_text(&name, length))
}

/// An MPI communicator. Never freed: freeing is collective, and a run makes few.
#[derive(Debug, Clone, Copy)]
pub(super) struct Comm(ffi::MPI_Comm);

// SAFETY: MPI_THREAD_MULTIPLE is granted, so handles may be used from any thread.
unsafe impl Send for Comm {}
// SAFETY: as above.
unsafe impl Sync for Comm {}

impl Comm {
    fn return_errors(self) -> Result<()> {
        // SAFETY: a valid communicator and a constant of the library.
        check(unsafe { ffi::MPI_Comm_set_errhandler(self.0, ffi::RSMPI_ERRORS_RETURN) })
    }

    pub(super) fn rank(self) -> Result<usize> {
        let mut rank = 0;
        // SAFETY: a valid communicator.
        check(unsafe { ffi::MPI_Comm_rank(self.0, &mut rank) })?;
        Ok(rank as usize)
    }

    pub(super) fn size(self) -> Result<usize> {
        let mut size = 0;
        // SAFETY: a valid communicator.
        check(unsafe { ffi::MPI_Comm_size(self.0, &mut size) })?;
        Ok(size as usize)
    }

    /// Starts a duplicate; the second value says when it may be used. Collective.
    pub(super) fn start_duplicate(self) -> Result<Duplicate> {
        // SAFETY: a constant of the library, to be overwritten.
        let mut to = Box::new(unsafe { ffi::RSMPI_COMM_NULL });
        let mut raw = no_request();
        // SAFETY: `to` lives on the heap until the request is done, or is leaked with it.
        check(unsafe { ffi::MPI_Comm_idup(self.0, &mut *to, raw.as_mut_ptr()) })?;
        // SAFETY: MPI has written the request.
        Ok(Duplicate(Request::new(unsafe { raw.assume_init() }, to)))
    }

    /// Cuts the communicator. Collective and blocking: call it where all ranks are known to have come, and with a watch.
    pub(super) fn split(self, color: Option<usize>, key: usize) -> Result<Option<Self>> {
        // SAFETY: constants of the library; a valid communicator.
        let (undefined, mut to) = unsafe { (ffi::RSMPI_UNDEFINED, ffi::RSMPI_COMM_NULL) };
        let color = color.map_or(undefined, |color| color as c_int);
        // SAFETY: `to` is a valid place for a handle.
        check(unsafe { ffi::MPI_Comm_split(self.0, color, key as c_int, &mut to) })?;
        if color == undefined {
            return Ok(None);
        }
        Self(to).return_errors()?;
        Ok(Some(Self(to)))
    }

    /// Starts to send `bytes`, which lie in `memory`.
    ///
    /// # Safety
    /// The bytes must stay where they are, unchanged, for as long as `memory` lives.
    pub(super) unsafe fn start_send(self, bytes: &[u8], memory: Memory, to: usize, tag: i32) -> Result<Sending> {
        let mut raw = no_request();
        let (start, count) = (bytes.as_ptr().cast(), bytes.len() as c_int);
        // SAFETY: the caller keeps the bytes alive through `memory`, which the request owns until it is done.
        check(unsafe { ffi::MPI_Isend(start, count, ffi::RSMPI_UINT8_T, to as c_int, tag, self.0, raw.as_mut_ptr()) })?;
        // SAFETY: MPI has written the request.
        Ok(Sending { request: Request::new(unsafe { raw.assume_init() }, memory), to })
    }

    /// Starts to receive up to `chunk.len()` bytes from `from`, or from anyone.
    pub(super) fn start_receive(self, mut chunk: Chunk, from: Option<usize>, tag: i32) -> Result<Receive> {
        let mut raw = no_request();
        let bytes = chunk.bytes_mut();
        let (start, count) = (bytes.as_mut_ptr().cast(), bytes.len() as c_int);
        // SAFETY: a constant of the library.
        let from = from.map_or(unsafe { ffi::RSMPI_ANY_SOURCE }, |rank| rank as c_int);
        // SAFETY: the memory of a chunk does not move, and the request owns the chunk until it is done.
        check(unsafe { ffi::MPI_Irecv(start, count, ffi::RSMPI_UINT8_T, from, tag, self.0, raw.as_mut_ptr()) })?;
        // SAFETY: MPI has written the request.
        Ok(Receive(Request::new(unsafe { raw.assume_init() }, chunk)))
    }
}

fn no_request() -> MaybeUninit<ffi::MPI_Request> {
    MaybeUninit::uninit()
}

/// What keeps the bytes of a send alive.
#[derive(Clone)]
pub(super) enum Memory {
    /// A buffer of the pool, perhaps sent to several peers.
    Chunk { _chunk: Arc<Chunk> },
    /// A message that the caller gave away.
    Message { _message: Arc<Vec<u8>> },
    /// Values that the caller keeps unchanged.
    Values { _values: Shared },
}

/// A request and the memory that MPI uses for it.
struct Request<M> {
    raw: ffi::MPI_Request,
    memory: ManuallyDrop<M>,
    received: usize,
    state: State,
}

#[derive(PartialEq, Eq)]
enum State {
    Pending,
    Done,
    Taken,
}

// SAFETY: MPI_THREAD_MULTIPLE is granted; a request is used by one thread at a time, because `test` takes it mutably.
unsafe impl<M: Send> Send for Request<M> {}

impl<M> Request<M> {
    fn new(raw: ffi::MPI_Request, memory: M) -> Self {
        Self { raw, memory: ManuallyDrop::new(memory), received: 0, state: State::Pending }
    }

    /// True once MPI is done with the memory.
    fn test(&mut self) -> Result<bool> {
        if self.state != State::Pending {
            return Ok(true);
        }
        let mut flag = 0;
        let mut status = MaybeUninit::<ffi::MPI_Status>::zeroed();
        // SAFETY: a pending request of this library.
        let code = unsafe { ffi::MPI_Test(&mut self.raw, &mut flag, status.as_mut_ptr()) };
        // A request that failed is over as well.
        if flag != 0 || code != ffi::MPI_SUCCESS as c_int {
            self.state = State::Done;
        }
        check(code)?;
        if flag != 0 {
            let mut count = 0;
            // SAFETY: MPI has written the status of a completed request.
            check(unsafe { ffi::MPI_Get_count(status.as_ptr(), ffi::RSMPI_UINT8_T, &mut count) })?;
            self.received = count.max(0) as usize;
        }
        Ok(flag != 0)
    }

    /// The memory of a request that is done.
    fn take(mut self) -> M {
        assert!(self.state == State::Done, "memory of a pending request");
        self.state = State::Taken;
        // SAFETY: MPI is done with it, and `Taken` keeps drop from freeing it again.
        unsafe { ManuallyDrop::take(&mut self.memory) }
    }
}

impl<M> Drop for Request<M> {
    fn drop(&mut self) {
        if self.state == State::Done {
            // SAFETY: MPI is done with it, and it was not taken.
            unsafe { ManuallyDrop::drop(&mut self.memory) };
        }
    }
}

/// A send under way.
pub(super) struct Sending {
    request: Request<Memory>,
    to: usize,
}

impl Sending {
    /// The rank it goes to, in its communicator.
    pub(super) fn to(&self) -> usize {
        self.to
    }

    /// The same send, its peer called by another name: where all communicators come together, the rank of the world.
    pub(super) fn named(self, to: usize) -> Self {
        Self { to, ..self }
    }

    /// True once the bytes have left.
    pub(super) fn test(&mut self) -> Result<bool> {
        self.request.test()
    }
}

/// A receive under way.
pub(super) struct Receive(Request<Chunk>);

impl Receive {
    /// True once the bytes have come.
    pub(super) fn test(&mut self) -> Result<bool> {
        self.0.test()
    }

    /// The bytes of a receive that is done, cut to what has come.
    pub(super) fn take(self) -> Chunk {
        let length = self.0.received;
        let mut chunk = self.0.take();
        chunk.truncate(length);
        chunk
    }

    /// Gives the receive up, so that MPI can be finalized.
    pub(super) fn cancel(mut self) -> Result<()> {
        if self.test()? {
            return Ok(());
        }
        // SAFETY: a pending receive.
        check(unsafe { ffi::MPI_Cancel(&mut self.0.raw) })?;
        // SAFETY: as above; a cancelled receive completes without a message.
        let code = unsafe { ffi::MPI_Wait(&mut self.0.raw, ffi::RSMPI_STATUS_IGNORE) };
        self.0.state = State::Done;
        check(code)
    }
}

/// A duplicate of a communicator that is being made.
pub(super) struct Duplicate(Request<Box<ffi::MPI_Comm>>);

impl Duplicate {
    /// The new communicator, once it is made.
    pub(super) fn poll(&mut self) -> Result<Option<Comm>> {
        if !self.0.test()? {
            return Ok(None);
        }
        let comm = Comm(**self.0.memory);
        comm.return_errors()?;
        Ok(Some(comm))
    }
}
