//! The NCCL and CUDA libraries: are they there, and what do their errors say.

use std::ffi::CStr;

use cudarc::driver::DriverError;
use cudarc::nccl::result::NcclError;
use cudarc::nccl::sys;
use libloading::Library;

use crate::error::{Error, Result};

/// One library, as the binding looks for it.
struct Wanted {
    /// A function of it, to see whether it was linked at build time.
    symbol: &'static [u8],
    /// Names that the binding tries.
    names: &'static [&'static str],
    /// A name that is often the only one installed but that the binding does not try.
    untried: &'static str,
    remedy: &'static str,
}

const CUDA: Wanted = Wanted {
    symbol: b"cuInit",
    names: &["libcuda.so", "libcuda.so.1"],
    untried: "",
    remedy: "the CUDA driver library libcuda.so was not found: install the NVIDIA driver, or run without GPUs",
};

const NCCL: Wanted = Wanted {
    symbol: b"ncclGetVersion",
    names: &["libnccl.so", "libnccl.so.13", "libnccl.so.12", "libnccl.so.11", "libnccl.so.10", "libnccl.so.1"],
    untried: "libnccl.so.2",
    remedy: "the library libnccl.so was not found: install NCCL, or add its directory to LD_LIBRARY_PATH",
};

/// Fails unless both libraries can be used. The binding panics without them, so this comes first.
///
/// # Errors
/// [`Error::Launch`], with what to do.
pub(super) fn check_present() -> Result<()> {
    find(&CUDA)?;
    find(&NCCL)
}

fn find(wanted: &Wanted) -> Result<()> {
    // SAFETY: the symbol is only looked for, not called.
    let linked = unsafe { libloading::os::unix::Library::this().get::<*const ()>(wanted.symbol) }.is_ok();
    if linked || wanted.names.iter().any(|name| opens(name)) {
        return Ok(());
    }
    if !wanted.untried.is_empty() && opens(wanted.untried) {
        let (there, name) = (wanted.untried, wanted.names[0]);
        return Err(Error::Launch(format!(
            "{there} is installed, but it is looked for as {name}: make a symbolic link {name} -> {there} in a directory \
             that is in LD_LIBRARY_PATH"
        )));
    }
    Err(Error::Launch(wanted.remedy.into()))
}

fn opens(name: &str) -> bool {
    // SAFETY: these are the libraries that are about to be used anyway; their initializers are trusted.
    unsafe { Library::new(name) }.is_ok()
}

/// An error of NCCL in this crate's words.
pub(super) fn nccl_error(rank: usize, error: &NcclError) -> Error {
    // SAFETY: the library is present, or there would be no error of it; the text is static.
    let text = unsafe { CStr::from_ptr(sys::ncclGetErrorString(error.0)) };
    let text = text.to_string_lossy().into_owned();
    Error::Backend { rank, library: "NCCL", code: i64::from(error.0 as u32), text }
}

/// An error of CUDA in this crate's words.
pub(super) fn cuda_error(rank: usize, error: DriverError) -> Error {
    Error::Backend { rank, library: "CUDA", code: i64::from(error.0 as u32), text: error.to_string() }
}

/// A configuration in which nothing is chosen but that calls do not block.
pub(super) fn non_blocking() -> sys::ncclConfig_t {
    /// What NCCL takes for "not set".
    const UNSET: i32 = i32::MIN;
    sys::ncclConfig_t {
        size: size_of::<sys::ncclConfig_t>(),
        magic: 0xcafe_beef,
        // The version of the structure: 2.30.0.
        version: 23_000,
        blocking: 0,
        cgaClusterSize: UNSET,
        minCTAs: UNSET,
        maxCTAs: UNSET,
        netName: std::ptr::null(),
        splitShare: UNSET,
        trafficClass: UNSET,
        commName: std::ptr::null(),
        collnetEnable: UNSET,
        CTAPolicy: UNSET,
        shrinkShare: UNSET,
        nvlsCTAs: UNSET,
        nChannelsPerNetPeer: UNSET,
        nvlinkCentricSched: UNSET,
        graphUsageMode: UNSET,
        numRmaCtx: UNSET,
        maxP2pPeers: UNSET,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let wanted = Wanted { symbol: b"noSuchFunction", names: &["libno-such.so"], untried: "", remedy: "install it" };
        assert_eq!(find(&wanted).unwrap_err().to_string(), "launch: install it");
        // The C library stands for the one that is installed under another name only.
        let trap = Wanted { untried: "libc.so.6", ..wanted };
        let error = find(&trap).unwrap_err().to_string();
        assert!(error.contains("symbolic link libno-such.so -> libc.so.6"), "{error}");
        find(&Wanted { symbol: b"malloc", ..trap }).unwrap();
        find(&Wanted { names: &["libc.so.6"], ..trap }).unwrap();
    }
}
