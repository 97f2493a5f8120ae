//! A file system that stops or fails at a chosen call, and remembers what was asked of it.

// Each test binary uses a part of this.
#![allow(dead_code)]

use std::fmt;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use tandem_store::{OsVfs, Vfs, VfsFile};

/// What happens at the chosen call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The process dies: this call and all after it have no effect.
    Kill,
    /// This call fails with this error number; later calls work.
    Errno(i32),
}

pub(crate) const ENOSPC: i32 = 28;
pub(crate) const EIO: i32 = 5;

/// One call, as it was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Op {
    CreateDir(PathBuf),
    CreateFile(PathBuf),
    Write(PathBuf),
    SyncFile(PathBuf),
    SyncDir(PathBuf),
    Rename(PathBuf, PathBuf),
    Exchange(PathBuf, PathBuf),
    Remove(PathBuf),
}

#[derive(Debug, Default)]
struct State {
    ops: Vec<Op>,
    fail_at: Option<(usize, Fault)>,
}

/// See the module.
#[derive(Debug, Clone, Default)]
pub(crate) struct FaultyVfs {
    state: Arc<Mutex<State>>,
    without_exchange: bool,
}

impl FaultyVfs {
    /// Fails at call `index`, counted from now.
    pub(crate) fn arm(&self, index: usize, fault: Fault) {
        let mut state = self.state.lock().unwrap();
        state.ops.clear();
        state.fail_at = Some((index, fault));
    }

    /// Works from now on, and counts from zero.
    pub(crate) fn disarm(&self) {
        *self.state.lock().unwrap() = State::default();
    }

    /// The calls so far.
    pub(crate) fn ops(&self) -> Vec<Op> {
        self.state.lock().unwrap().ops.clone()
    }

    /// As if the file system could not swap two names.
    pub(crate) fn without_exchange() -> Self {
        Self { without_exchange: true, ..Self::default() }
    }

    fn call<T>(&self, op: Op, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let fault = {
            let mut state = self.state.lock().unwrap();
            let index = state.ops.len();
            state.ops.push(op);
            state.fail_at.filter(|&(at, fault)| index == at || (fault == Fault::Kill && index > at))
        };
        match fault {
            None => work(),
            Some((_, Fault::Kill)) => Err(io::Error::other("the process was killed here")),
            Some((_, Fault::Errno(errno))) => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

struct FaultyFile {
    vfs: FaultyVfs,
    path: PathBuf,
    inner: Box<dyn VfsFile>,
}

impl fmt::Debug for FaultyFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())
    }
}

impl Write for FaultyFile {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let outcome = self.vfs.call(Op::Write(self.path.clone()), || Ok(()));
        if let Err(error) = outcome {
            // A failing write leaves a part behind.
            self.inner.write_all(&buffer[..buffer.len() / 2])?;
            return Err(error);
        }
        self.inner.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl VfsFile for FaultyFile {
    fn sync(&mut self) -> io::Result<()> {
        self.vfs.clone().call(Op::SyncFile(self.path.clone()), || self.inner.sync())
    }
}

impl Vfs for FaultyVfs {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.call(Op::CreateDir(path.into()), || OsVfs.create_dir(path))
    }

    fn create_file(&self, path: &Path) -> io::Result<Box<dyn VfsFile>> {
        let inner = self.call(Op::CreateFile(path.into()), || OsVfs.create_file(path))?;
        Ok(Box::new(FaultyFile { vfs: self.clone(), path: path.into(), inner }))
    }

    fn sync_file(&self, path: &Path) -> io::Result<()> {
        self.call(Op::SyncFile(path.into()), || OsVfs.sync_file(path))
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.call(Op::SyncDir(path.into()), || OsVfs.sync_dir(path))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.call(Op::Rename(from.into(), to.into()), || OsVfs.rename(from, to))
    }

    fn exchange(&self, one: &Path, other: &Path) -> io::Result<()> {
        if self.without_exchange {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.call(Op::Exchange(one.into(), other.into()), || OsVfs.exchange(one, other))
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.call(Op::Remove(path.into()), || OsVfs.remove_file(path))
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        let outcome = self.call(Op::Remove(path.into()), || OsVfs.remove_dir_all(path));
        if outcome.is_err()
            && let Some(Ok(first)) = std::fs::read_dir(path).ok().and_then(|mut entries| entries.next())
        {
            // A failing removal has removed a part.
            let _ = std::fs::remove_file(first.path());
        }
        outcome
    }
}

/// Names in `dir` that start with a dot: what a publish or a removal has left behind.
pub(crate) fn leftovers(dir: &Path) -> Vec<String> {
    std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with('.'))
        .collect()
}
