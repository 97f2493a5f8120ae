//! What a core of this machine can multiply, in f32 and bf16, from registers and with the reads that a product needs: what
//! the products of the bench `gemm` are to be compared with, on one thread.
//!
//! The two differ on a core that serves two programs, and hardly on one that is ours: run it beside what it explains.

#[cfg(not(target_arch = "x86_64"))]
fn main() {
    println!("no ceiling is known for this processor");
}

#[cfg(target_arch = "x86_64")]
criterion::criterion_group!(benches, x86::ceiling);
#[cfg(target_arch = "x86_64")]
criterion::criterion_main!(benches);

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;
    use std::time::Duration;

    use candle_core::{DType, Device, Tensor};
    use criterion::{Criterion, Throughput};
    use tandem_kernels::Isa;
    use tandem_kernels::gemm::linear;

    /// Steps of a loop.
    const STEPS: usize = 4096;
    /// Bytes that a loop reads again and again, which any first-level cache holds; a power of two.
    const BYTES: usize = 8192;

    #[repr(align(64))]
    struct Lines([u8; BYTES]);

    pub(crate) fn ceiling(c: &mut Criterion) {
        let lines = Lines([0; BYTES]);
        let mut group = c.benchmark_group("ceiling");
        group.sample_size(50).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_secs(1));
        if Isa::active() >= Isa::Avx512 {
            // 16 lanes, a multiplication and an addition.
            group.throughput(Throughput::Elements((STEPS * 24 * 32) as u64));
            // SAFETY: AVX-512 is active.
            group.bench_function("f32 registers", |b| b.iter(|| unsafe { multiply_registers() }));
            // SAFETY: as above, and the lines hold what is read.
            group.bench_function("f32 12 x 32", |b| b.iter(|| unsafe { multiply_read(&lines) }));
        }
        if Isa::active() >= Isa::Amx {
            // The system lets a process use tiles once a product has asked it to.
            let x = Tensor::zeros((64, 64), DType::BF16, &Device::Cpu).unwrap();
            linear(&x, &x, None).unwrap();
            let mut config = [0u8; 64];
            config[0] = 1;
            for tile in 0..8 {
                (config[16 + 2 * tile], config[48 + tile]) = (64, 16);
            }
            // SAFETY: 8 tiles of 16 rows of 64 bytes, which the processor has; nothing else on this thread uses them meanwhile.
            unsafe { asm!("ldtilecfg [{}]", in(reg) config.as_ptr(), options(nostack, readonly)) };
            group.throughput(Throughput::Elements((STEPS * 4 * 16 * 16 * 64) as u64));
            // SAFETY: tiles are configured.
            group.bench_function("bf16 registers", |b| b.iter(|| unsafe { multiply_tiles() }));
            // SAFETY: as above, and the lines hold what is read.
            group.bench_function("bf16 32 x 32", |b| b.iter(|| unsafe { multiply_loaded_tiles(&lines) }));
            // SAFETY: no more than this thread's tiles.
            unsafe { asm!("tilerelease", options(nostack, nomem)) };
        }
        group.finish();
    }

    /// Zeros for these registers: of numbers left there some might be slow to multiply.
    macro_rules! clear {
        ($($n:literal)*) => { concat!($("vpxord zmm", $n, ", zmm", $n, ", zmm", $n, "\n"),*) };
    }

    /// A multiplication into each of these registers.
    macro_rules! step {
        ($($n:literal)*) => { concat!($("vfmadd231ps zmm", $n, ", zmm24, zmm25\n"),*) };
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn multiply_registers() {
        // SAFETY: touches registers only.
        unsafe {
            asm!(
                clear!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25),
                "2:",
                step!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23),
                "dec {steps}", "jnz 2b",
                steps = inout(reg) STEPS => _,
                out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _, out("zmm4") _, out("zmm5") _, out("zmm6") _,
                out("zmm7") _, out("zmm8") _, out("zmm9") _, out("zmm10") _, out("zmm11") _, out("zmm12") _, out("zmm13") _,
                out("zmm14") _, out("zmm15") _, out("zmm16") _, out("zmm17") _, out("zmm18") _, out("zmm19") _,
                out("zmm20") _, out("zmm21") _, out("zmm22") _, out("zmm23") _, out("zmm24") _, out("zmm25") _,
                options(nostack, nomem),
            );
        }
    }

    /// Two vectors of B, and an element of A for each row.
    macro_rules! rows {
        ($($at:literal $a:literal $b:literal)*) => {
            concat!($(
                "vbroadcastss zmm26, dword ptr [{a} + ", $at, "]\n",
                "vfmadd231ps zmm", $a, ", zmm26, zmm24\n",
                "vfmadd231ps zmm", $b, ", zmm26, zmm25\n"
            ),*)
        };
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn multiply_read(lines: &Lines) {
        // SAFETY: reads the lines, 128 bytes a step, and begins again at their end.
        unsafe {
            asm!(
                clear!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23),
                "2:",
                "vmovaps zmm24, [{a}]", "vmovaps zmm25, [{a} + 64]",
                rows!(0 0 1 4 2 3 8 4 5 12 6 7 16 8 9 20 10 11 24 12 13 28 14 15 32 16 17 36 18 19 40 20 21 44 22 23),
                "add {at}, 128", "and {at}, {mask}", "lea {a}, [{start} + {at}]",
                "dec {steps}", "jnz 2b",
                steps = inout(reg) STEPS => _, at = inout(reg) 0usize => _, mask = in(reg) BYTES - 1,
                start = in(reg) lines.0.as_ptr(), a = inout(reg) lines.0.as_ptr() => _,
                out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _, out("zmm4") _, out("zmm5") _, out("zmm6") _,
                out("zmm7") _, out("zmm8") _, out("zmm9") _, out("zmm10") _, out("zmm11") _, out("zmm12") _, out("zmm13") _,
                out("zmm14") _, out("zmm15") _, out("zmm16") _, out("zmm17") _, out("zmm18") _, out("zmm19") _,
                out("zmm20") _, out("zmm21") _, out("zmm22") _, out("zmm23") _, out("zmm24") _, out("zmm25") _,
                out("zmm26") _,
                options(nostack, readonly),
            );
        }
    }

    unsafe fn multiply_tiles() {
        // SAFETY: touches tiles only.
        unsafe {
            asm!(
                "2:",
                "tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6", "tdpbf16ps tmm3, tmm5, tmm7",
                "dec {steps}", "jnz 2b",
                steps = inout(reg) STEPS => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                options(nostack, nomem),
            );
        }
    }

    unsafe fn multiply_loaded_tiles(lines: &Lines) {
        // SAFETY: reads the lines, 4 KiB a step, and begins again at their end.
        unsafe {
            asm!(
                "2:",
                "tileloadd tmm4, [{a} + {line}*1]", "tileloadd tmm6, [{a} + {line}*1 + 1024]",
                "tileloadd tmm7, [{a} + {line}*1 + 2048]", "tileloadd tmm5, [{a} + {line}*1 + 3072]",
                "tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6", "tdpbf16ps tmm3, tmm5, tmm7",
                "add {at}, 4096", "and {at}, {mask}", "lea {a}, [{start} + {at}]",
                "dec {steps}", "jnz 2b",
                steps = inout(reg) STEPS => _, at = inout(reg) 0usize => _, mask = in(reg) BYTES - 1,
                start = in(reg) lines.0.as_ptr(), a = inout(reg) lines.0.as_ptr() => _, line = in(reg) 64usize,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, readonly),
            );
        }
    }
}
