//! One scalar source, compiled for each instruction set, chosen at run time.
//!
//! [`simd_fn!`] takes the body of a kernel written as plain loops and fused multiply-adds and compiles it for AVX-512,
//! for AVX2 with FMA, and for the build's baseline. Bodies fix their own order of arithmetic (see [`crate::math`]), so
//! every path with a hardware FMA gives the same bits.

use std::sync::atomic::{AtomicU8, Ordering};

/// An instruction set that kernels are compiled for, narrowest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Isa {
    /// What the build targets; without a hardware fused multiply-add it rounds twice.
    Portable = 1,
    /// AVX2 and FMA.
    Avx2 = 2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512 = 3,
    /// AVX-512 with bf16, and bf16 matrix tiles (Intel AMX): products of bf16 matrices, else as [`Isa::Avx512`].
    Amx = 4,
}

static ACTIVE: AtomicU8 = AtomicU8::new(0);

impl Isa {
    /// The widest set of this processor.
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if avx512 && crate::amx::available() {
                return Isa::Amx;
            }
            if avx512 {
                return Isa::Avx512;
            }
            if avx2 {
                return Isa::Avx2;
            }
        }
        Isa::Portable
    }

    /// The set in use: the widest, unless [`Isa::force`] chose another.
    #[inline]
    pub fn active() -> Self {
        match ACTIVE.load(Ordering::Relaxed) {
            1 => Isa::Portable,
            2 => Isa::Avx2,
            3 => Isa::Avx512,
            4 => Isa::Amx,
            _ => {
                let isa = Self::detect();
                ACTIVE.store(isa as u8, Ordering::Relaxed);
                isa
            }
        }
    }

    /// Uses `self` for the whole process if the processor has it; returns whether it does.
    pub fn force(self) -> bool {
        let has = self <= Self::detect();
        if has {
            ACTIVE.store(self as u8, Ordering::Relaxed);
        }
        has
    }
}

/// `a * b + c`, fused where `FMA` says that the instruction exists.
#[inline(always)]
pub(crate) fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// Whether the build's baseline has a fused multiply-add instruction.
pub(crate) const PORTABLE_FMA: bool = cfg!(any(target_feature = "fma", target_arch = "aarch64"));

/// Defines a function compiled for each [`Isa`] and dispatched at run time.
///
/// `simd_fn! { pub(crate) fn name(args) -> Ret = body; }` needs `body::<const FMA: bool>` with the same arguments,
/// marked `#[inline(always)]`; `fn name<E: Element>(args)` needs `body::<E: Element, const FMA: bool>`.
macro_rules! simd_fn {
    ($(#[$meta:meta])* $vis:vis fn $name:ident$(<$($g:ident: $bound:path),+>)?($($arg:ident: $ty:ty),* $(,)?)
        $(-> $ret:ty)? = $body:ident;) => {
        $(#[$meta])*
        #[inline]
        $vis fn $name$(<$($g: $bound),+>)?($($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2")]
                fn avx512$(<$($g: $bound),+>)?($($arg: $ty),*) $(-> $ret)? { $body::<$($($g,)+)? true>($($arg),*) }
                #[target_feature(enable = "avx2,fma,bmi2")]
                fn avx2$(<$($g: $bound),+>)?($($arg: $ty),*) $(-> $ret)? { $body::<$($($g,)+)? true>($($arg),*) }
                match $crate::simd::Isa::active() {
                    // SAFETY: `Isa::active` never returns a set that `Isa::detect` did not find.
                    $crate::simd::Isa::Amx | $crate::simd::Isa::Avx512 => return unsafe { avx512$(::<$($g),+>)?($($arg),*) },
                    // SAFETY: as above.
                    $crate::simd::Isa::Avx2 => return unsafe { avx2$(::<$($g),+>)?($($arg),*) },
                    $crate::simd::Isa::Portable => {}
                }
            }
            $body::<$($($g,)+)? { $crate::simd::PORTABLE_FMA }>($($arg),*)
        }
    };
}
pub(crate) use simd_fn;
