//! The door to a tensor's elements, and tensors that other threads read.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use candle_core::{DType, Device, Tensor};
use common::{flat, random, tensor};
use tandem_kernels::slice::{SharedTensor, with_slice, with_slice_mut};

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
