//! Reading what was published: every byte is checked against the manifest before anyone uses it.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::{Result, StoreError};
use crate::manifest::{FileEntry, MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest};

/// Bytes read at a time while digesting.
const CHUNK_BYTES: usize = 1 << 20;

/// A published directory whose manifest, lengths and digests have been checked.
#[derive(Debug)]
pub struct Published {
    dir: PathBuf,
    manifest: Manifest,
}

impl Published {
    /// Opens `dir` and checks everything its manifest lists. Files that it does not list are ignored.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] naming the file that is missing, cut, or changed; [`StoreError::NewerFormat`]; or an error
    /// of the file system.
    pub fn open(dir: &Path) -> Result<Self> {
        let manifest = read_manifest(dir)?;
        for entry in &manifest.files {
            let path = dir.join(&entry.name);
            let mut digest = blake3::Hasher::new();
            read_entry(&path, entry, |chunk| {
                digest.update(chunk);
            })?;
            check_digest(&path, entry, digest.finalize())?;
        }
        Ok(Self { dir: dir.to_path_buf(), manifest })
    }

    /// An entry whose bytes this process has digested while writing them.
    pub(crate) fn just_written(dir: PathBuf, manifest: Manifest) -> Self {
        Self { dir, manifest }
    }

    /// The published directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What was published, for example `checkpoint`.
    pub fn kind(&self) -> &str {
        &self.manifest.kind
    }

    /// The files, in the order they were written.
    pub fn files(&self) -> &[FileEntry] {
        &self.manifest.files
    }

    /// What the publisher wrote beside the files.
    pub fn meta(&self) -> &Value {
        &self.manifest.meta
    }

    /// [`Self::meta`] as a typed value.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] if it has another shape.
    pub fn meta_as<T: DeserializeOwned>(&self) -> Result<T> {
        T::deserialize(&self.manifest.meta)
            .map_err(|error| StoreError::corrupt(&self.dir.join(MANIFEST_NAME), format!("unexpected meta: {error}")))
    }

    /// Whether the manifest lists `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.entry(name).is_some()
    }

    /// Where the listed file `name` is, for readers that want a path.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] if the manifest does not list it.
    pub fn path(&self, name: &str) -> Result<PathBuf> {
        self.entry(name).map(|entry| self.dir.join(&entry.name)).ok_or_else(|| self.not_listed(name))
    }

    /// The bytes of the listed file `name`. The bytes returned are the bytes digested: a change since [`Self::open`] is
    /// found too.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] if the manifest does not list it or the bytes have changed, or an error of the file system.
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        let entry = self.entry(name).ok_or_else(|| self.not_listed(name))?;
        let path = self.dir.join(&entry.name);
        let mut bytes = Vec::new();
        read_entry(&path, entry, |chunk| bytes.extend_from_slice(chunk))?;
        check_digest(&path, entry, blake3::hash(&bytes))?;
        Ok(bytes)
    }

    fn entry(&self, name: &str) -> Option<&FileEntry> {
        self.manifest.files.iter().find(|entry| entry.name == name)
    }

    fn not_listed(&self, name: &str) -> StoreError {
        let listed: Vec<&str> = self.manifest.files.iter().map(|entry| entry.name.as_str()).collect();
        StoreError::corrupt(&self.dir, format!("it has no file {name:?}, only {}", listed.join(", ")))
    }
}

fn read_manifest(dir: &Path) -> Result<Manifest> {
    let path = dir.join(MANIFEST_NAME);
    let mut text = Vec::new();
    let file = open_listed(&path)?;
    file.take(MAX_MANIFEST_BYTES + 1).read_to_end(&mut text).map_err(|error| StoreError::io("read", &path, error))?;
    if text.len() as u64 > MAX_MANIFEST_BYTES {
        return Err(StoreError::corrupt(&path, format!("it is longer than {MAX_MANIFEST_BYTES} bytes")));
    }
    Manifest::parse(&text, dir)
}

/// Opens a file that must be there; that it is missing, or not a plain file, is damage rather than an error of the system.
fn open_listed(path: &Path) -> Result<File> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_file() => File::open(path).map_err(|error| StoreError::io("open", path, error)),
        Ok(_) => Err(StoreError::corrupt(path, "it is not a plain file")),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Err(StoreError::corrupt(path, "it is missing"))
        }
        Err(error) => Err(StoreError::io("look at", path, error)),
    }
}

/// Hands the bytes of a listed file to `each`, after checking the length and before checking the digest.
fn read_entry(path: &Path, entry: &FileEntry, mut each: impl FnMut(&[u8])) -> Result<()> {
    let mut file = open_listed(path)?;
    let length = file.metadata().map_err(|error| StoreError::io("look at", path, error))?.len();
    if length != entry.bytes {
        return Err(StoreError::corrupt(path, format!("it has {length} bytes, {} were published", entry.bytes)));
    }
    let mut chunk = vec![0; CHUNK_BYTES.min(entry.bytes.try_into().unwrap_or(CHUNK_BYTES))];
    let mut remaining = entry.bytes;
    while remaining > 0 {
        let take = chunk.len().min(remaining.try_into().unwrap_or(chunk.len()));
        file.read_exact(&mut chunk[..take]).map_err(|error| StoreError::io("read", path, error))?;
        each(&chunk[..take]);
        remaining -= take as u64;
    }
    Ok(())
}

fn check_digest(path: &Path, entry: &FileEntry, found: blake3::Hash) -> Result<()> {
    if found.to_hex().as_str() == entry.blake3 {
        Ok(())
    } else {
        Err(StoreError::corrupt(path, "its bytes do not have the digest that was published"))
    }
}
