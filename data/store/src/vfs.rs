//! The few file-system calls that change anything, behind a trait, so that tests can stop or fail each one.
//!
//! Reading is not behind it: a read changes nothing, and every byte read is checked against a digest.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

/// A file being written.
pub trait VfsFile: Write + Send {
    /// Returns once everything written so far is on the device.
    ///
    /// # Errors
    /// The data may be lost after an error, and a second attempt on the same file may falsely succeed (Linux marks the
    /// failed pages clean): discard the file.
    fn sync(&mut self) -> io::Result<()>;
}

/// The calls that change a file system.
pub trait Vfs: std::fmt::Debug + Send + Sync {
    /// Creates one directory; its parent must exist and it must not.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// Creates a file for writing; it is an error if anything, a symbolic link too, has that name already.
    fn create_file(&self, path: &Path) -> io::Result<Box<dyn VfsFile>>;
    /// Returns once the bytes of an existing file are on the device.
    fn sync_file(&self, path: &Path) -> io::Result<()>;
    /// Returns once the names in a directory are on the device.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Renames a file or directory.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Swaps two names in one atomic step. `Unsupported` where the file system cannot.
    fn exchange(&self, one: &Path, other: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    /// Removes a directory and what is in it, without following symbolic links.
    fn remove_dir_all(&self, path: &Path) -> io::Result<()>;
}

/// The operating system's file system.
#[derive(Debug, Clone, Copy, Default)]
pub struct OsVfs;

impl VfsFile for File {
    fn sync(&mut self) -> io::Result<()> {
        self.sync_all()
    }
}

impl Vfs for OsVfs {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::create_dir(path)
    }

    fn create_file(&self, path: &Path) -> io::Result<Box<dyn VfsFile>> {
        Ok(Box::new(OpenOptions::new().write(true).create_new(true).open(path)?))
    }

    fn sync_file(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn exchange(&self, one: &Path, other: &Path) -> io::Result<()> {
        renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).map_err(|errno| match errno {
            Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP => io::ErrorKind::Unsupported.into(),
            other => other.into(),
        })
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir_all(path)
    }
}
