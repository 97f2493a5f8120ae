//! The bf16 matrix tiles of x86 (Intel AMX): detection, permission, configuration and the instructions.
//!
//! By inline assembly, because the intrinsics are not in stable Rust. A tile holds 16 rows of 64 bytes: of a left matrix
//! 32 bf16, of a right matrix 16 pairs of bf16 (rows `2i` and `2i + 1` interleaved), of a sum 16 f32 (*Intel 64 and IA-32
//! Architectures Software Developer's Manual*, volume 1, chapter 18). Compilers keep nothing in tile registers.

use std::marker::PhantomData;

/// Whether processor and kernel give this process bf16 tiles, along with the AVX-512 that prepares their operands.
///
/// The first call asks the kernel for permission, which holds for all threads of the process.
pub(crate) fn available() -> bool {
    #[cfg(target_os = "linux")]
    {
        static AVAILABLE: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
        *AVAILABLE.get_or_init(|| processor_has_tiles() && kernel_permits_tiles())
    }
    #[cfg(not(target_os = "linux"))]
    {
        false
    }
}

#[cfg(target_os = "linux")]
fn processor_has_tiles() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    const AMX_BF16_AND_TILE: u32 = 1 << 22 | 1 << 24;
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512bf16");
    avx512 && __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & AMX_BF16_AND_TILE == AMX_BF16_AND_TILE
}

/// `arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)`: Linux hands out the 8 KiB of tile state only on request.
#[cfg(target_os = "linux")]
fn kernel_permits_tiles() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const REQUEST_PERMISSION: i64 = 0x1023;
    const TILE_DATA: i64 = 18;
    let mut result = ARCH_PRCTL;
    // SAFETY: a system call that reads and writes no memory of ours; it clobbers rcx and r11.
    unsafe {
        std::arch::asm!(
            "syscall", inout("rax") result, in("rdi") REQUEST_PERMISSION, in("rsi") TILE_DATA,
            out("rcx") _, out("r11") _, options(nostack)
        );
    }
    result == 0
}

/// Proof that this thread's eight tiles are configured as 16 rows of 64 bytes; dropping it releases them.
///
/// One at a time per thread, and no other task may run on the thread meanwhile: do not call rayon while holding one.
#[derive(Debug)]
pub(crate) struct Tiles(PhantomData<*const ()>);

impl Tiles {
    /// Configures the tiles of this thread, if there are any.
    pub(crate) fn new() -> Option<Self> {
        Self::with_left_rows(16)
    }

    /// Tiles of which those of sums and of left matrices, 0 to 5, have only `rows` rows (1 to 16). They are loaded and
    /// stored without the others and multiplied in less time; the bits of a row are the same.
    pub(crate) fn with_left_rows(left_rows: usize) -> Option<Self> {
        #[repr(C, align(64))]
        struct Config {
            palette: u8,
            start_row: u8,
            reserved: [u8; 14],
            row_bytes: [u16; 16],
            rows: [u8; 16],
        }
        if !available() {
            return None;
        }
        let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
        row_bytes[..8].fill(64);
        rows[..6].fill(left_rows.clamp(1, 16) as u8);
        rows[6..8].fill(16);
        let config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows };
        // SAFETY: the processor has tiles and the kernel permits them (`available`); `config` is a valid palette 1.
        unsafe { std::arch::asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly)) };
        Some(Self(PhantomData))
    }

    /// Sets tile `T` to zero.
    #[inline(always)]
    pub(crate) fn zero<const T: u8>(&self) {
        // SAFETY: tiles are configured; touches no memory.
        unsafe { std::arch::asm!("tilezero tmm{t}", t = const T, options(nostack, nomem)) };
    }

    /// Loads tile `T`: row `r` from `from + r · stride` bytes.
    ///
    /// # Safety
    /// The 16 rows of 64 bytes must be readable.
    #[inline(always)]
    pub(crate) unsafe fn load<const T: u8>(&self, from: *const u8, stride: usize) {
        // SAFETY: by contract.
        unsafe {
            std::arch::asm!(
                "tileloadd tmm{t}, [{from} + {stride}*1]",
                t = const T, from = in(reg) from, stride = in(reg) stride, options(nostack, readonly)
            );
        }
    }

    /// Stores tile `T`: row `r` to `to + r · stride` bytes.
    ///
    /// # Safety
    /// The 16 rows of 64 bytes must be writable.
    #[inline(always)]
    pub(crate) unsafe fn store<const T: u8>(&self, to: *mut u8, stride: usize) {
        // SAFETY: by contract.
        unsafe {
            std::arch::asm!(
                "tilestored [{to} + {stride}*1], tmm{t}",
                t = const T, to = in(reg) to, stride = in(reg) stride, options(nostack)
            );
        }
    }

    /// `C += A · B` of 16 × 32 by 32 × 16 bf16 into f32; every element is one chain over the pairs of `A`'s columns.
    ///
    /// Rounds to nearest even and takes subnormal inputs and results as zero.
    #[inline(always)]
    pub(crate) fn multiply_add<const C: u8, const A: u8, const B: u8>(&self) {
        // SAFETY: tiles are configured; touches no memory.
        unsafe {
            std::arch::asm!(
                "tdpbf16ps tmm{c}, tmm{a}, tmm{b}",
                c = const C, a = const A, b = const B, options(nostack, nomem)
            );
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: `new` found tiles; nothing reads them any more.
        unsafe { std::arch::asm!("tilerelease", options(nostack, nomem)) };
    }
}
