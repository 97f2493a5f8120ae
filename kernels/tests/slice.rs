//! The door to a tensor's elements, and tensors that other threads read.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use candle_core::{DType, Device, Tensor};
use common::{bits, flat, random, tensor, values, with_threads};
use half::bf16;
use tandem_kernels::slice::{
    SharedTensor, narrow_slice, to_bf16, to_f32, widen_slice, with_slice, with_slice_mut, with_slice_mut_of,
    with_slice_of, zeros,
};

#[test]
fn slices_are_the_elements_of_the_view() {
    let whole = tensor(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[3, 2]);
    let part = whole.narrow(0, 1, 2).unwrap();
    assert_eq!(with_slice(&part, <[f32]>::to_vec).unwrap(), [3.0, 4.0, 5.0, 6.0]);
    let written = with_slice_mut(&part, |values| {
        values[0] = 30.0;
        values.len()
    });
    assert_eq!(written.unwrap(), 4);
    assert_eq!(flat(&whole), [1.0, 2.0, 30.0, 4.0, 5.0, 6.0]);
    assert_eq!(SharedTensor::new(&part).unwrap().as_ref(), [30.0, 4.0, 5.0, 6.0]);
}

#[test]
fn zeros_are_zero_in_both_types() {
    for dtype in [DType::F32, DType::BF16] {
        for len in [0, 1, 100_003] {
            let all = zeros(len, dtype).unwrap();
            assert_eq!((all.dims(), all.dtype()), (&[len][..], dtype));
            let values = all.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap();
            assert!(values.iter().all(|value| value.to_bits() == 0));
        }
    }
    assert!(zeros(1, DType::F64).is_err());
}

#[test]
fn what_has_no_slice_is_refused() {
    let columns = random(&[4, 4], 1).narrow(1, 0, 2).unwrap();
    let wide = Tensor::zeros(3, DType::F64, &Device::Cpu).unwrap();
    for (bad, message) in [(&columns, "contiguous"), (&wide, "F64")] {
        for error in [
            with_slice(bad, |_| ()).unwrap_err(),
            with_slice_mut(bad, |_| ()).unwrap_err(),
            SharedTensor::new(bad).unwrap_err(),
        ] {
            assert!(error.to_string().contains(message), "{error}");
        }
    }
}

/// Shared with a thread, read there after every other handle is gone, and dropped there.
#[test]
fn another_thread_reads_without_a_copy() {
    let source = random(&[1000], 7);
    let expected = flat(&source);
    let address = with_slice(&source, |values| values.as_ptr() as usize).unwrap();
    let shared = Arc::new(SharedTensor::new(&source).unwrap());
    let readers: Vec<_> = (0..3)
        .map(|_| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || (shared.as_ref().as_ref().as_ptr() as usize, shared.as_ref().as_ref().to_vec()))
        })
        .collect();
    drop((source, shared));
    for reader in readers {
        assert_eq!(reader.join().unwrap(), (address, expected.clone()));
    }
}

/// Everybody reads while it is shared; a writer waits until it has been dropped, on whichever thread that happens.
#[test]
fn a_writer_waits_for_the_last_reader() {
    let source = tensor(&[1.0, 2.0], &[2]);
    let shared = SharedTensor::new(&source).unwrap();
    assert_eq!(with_slice(&source, |values| values[1]).unwrap(), 2.0);
    let written = Arc::new(AtomicBool::new(false));
    let writer = thread::spawn({
        let (source, written) = (source.clone(), Arc::clone(&written));
        move || {
            with_slice_mut(&source, |values| values[1] = 9.0).unwrap();
            written.store(true, Ordering::SeqCst);
        }
    });
    let reader = thread::spawn({
        let written = Arc::clone(&written);
        move || {
            thread::sleep(Duration::from_millis(50));
            assert!(!written.load(Ordering::SeqCst), "written while shared");
            assert_eq!(shared.as_ref(), [1.0, 2.0]);
        }
    });
    reader.join().unwrap();
    writer.join().unwrap();
    assert_eq!(flat(&source), [1.0, 9.0]);
}

#[test]
fn conversions_round_to_nearest_and_back_exactly() {
    let mut exact = values(40_001, 1);
    exact[..6].copy_from_slice(&[f32::NAN, f32::INFINITY, -0.0, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, f32::MAX]);
    let want: Vec<bf16> = exact.iter().map(|&value| bf16::from_f32(value)).collect();
    for threads in [1, 3] {
        let mut narrowed = vec![bf16::ZERO; exact.len()];
        let mut widened = vec![0.0; exact.len()];
        with_threads(threads, || narrow_slice(&exact, &mut narrowed)).unwrap();
        with_threads(threads, || widen_slice(&narrowed, &mut widened)).unwrap();
        assert!(narrowed[0].is_nan() && widened[0].is_nan());
        assert_eq!(narrowed[1..], want[1..]);
        assert!(widened[1..].iter().zip(&want[1..]).all(|(got, want)| got.to_bits() == want.to_f32().to_bits()));
    }
    assert!(narrow_slice(&exact, &mut [bf16::ZERO]).unwrap_err().to_string().contains("must be [40001], got [1]"));
    assert!(widen_slice(&want, &mut [0.0]).is_err());

    let whole = random(&[300, 130], 2);
    let half = to_bf16(&whole).unwrap();
    assert_eq!((half.dtype(), half.dims()), (DType::BF16, whole.dims()));
    assert_eq!(
        bits(&to_f32(&half).unwrap()),
        bits(&whole.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap())
    );
    let part = half.narrow(0, 7, 2).unwrap();
    assert_eq!(bits(&to_f32(&part).unwrap()), bits(&to_f32(&half).unwrap().narrow(0, 7, 2).unwrap()));
    assert_eq!(bits(&to_f32(&whole).unwrap()), bits(&whole));
    assert!(to_bf16(&whole.narrow(1, 0, 3).unwrap()).is_err() && to_f32(&whole.to_dtype(DType::F64).unwrap()).is_err());
}

#[test]
fn slices_of_bf16() {
    let t = to_bf16(&tensor(&[1.0, 2.0, 3.0], &[3])).unwrap();
    with_slice_mut_of::<bf16, _>(&t, |values| values[1] = bf16::from_f32(20.0)).unwrap();
    let want = [1.0, 20.0, 3.0].map(bf16::from_f32);
    assert_eq!(with_slice_of::<bf16, _>(&t, <[bf16]>::to_vec).unwrap(), want);
    let shared = SharedTensor::<bf16>::of(&t).unwrap();
    assert_eq!(thread::spawn(move || shared.as_ref().to_vec()).join().unwrap(), want);
    assert!(with_slice(&t, |_| ()).is_err() && with_slice_of::<f32, _>(&t, |_| ()).is_err());
    assert!(SharedTensor::new(&t).is_err());
}
