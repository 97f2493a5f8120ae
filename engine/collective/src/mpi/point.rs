//! Messages between two ranks.

use std::sync::{Arc, Mutex};

use super::group::{Group, MESSAGE_DATA, MESSAGE_HEADER, message, send_chunk};
use super::header::{Call, HEADER_BYTES, INLINE_BYTES, MESSAGE_BYTES, compare};
use super::library::Memory;
use super::process::lock;
use super::stage::{Advance, drive};
use super::stream::{Lane, WHOLE_PIECE_BYTES};
use crate::error::Result;
use crate::tag::Tag;

fn call(tag: Tag, length: usize) -> Call {
    Call { tag, operation: None, length, sequence: 0 }
}

/// Gives `bytes` away to rank `to`. Returns at once.
pub(super) fn send(group: &Group, tag: Tag, bytes: Vec<u8>, to: usize) -> Result<()> {
    group.check_rank(tag, to)?;
    let process = group.process();
    process.check()?;
    group.count_call();
    if to != group.rank() {
        group.count_sent(bytes.len());
    }
    let post = || {
        // Headers and data of two messages to one rank must leave in the same order.
        let _turn = lock(&group.sender);
        let small = bytes.len() <= INLINE_BYTES;
        let header = message(group, &call(tag, bytes.len()), if small { &bytes } else { &[] });
        let mut sends = vec![send_chunk(group.comm(), &Arc::new(header), to, MESSAGE_HEADER)?];
        if !small {
            let bytes = Arc::new(bytes);
            for piece in bytes.chunks(WHOLE_PIECE_BYTES) {
                let memory = Memory::Message { _message: Arc::clone(&bytes) };
                // SAFETY: the memory owns the bytes, which nobody can change any more.
                sends.push(unsafe { group.comm().start_send(piece, memory, to, MESSAGE_DATA) }?);
            }
        }
        group.park(sends);
        Ok(())
    };
    post().map_err(|error| process.fail(error))
}

/// The next message from rank `from`, which must have this tag and length.
pub(super) fn receive(group: &Group, tag: Tag, bytes: &mut [u8], from: usize) -> Result<()> {
    group.check_rank(tag, from)?;
    let process = group.process();
    process.check()?;
    group.count_call();
    let _turn = lock(&group.receivers[from]);
    let failed = |error| process.fail(error);
    let chunk = process.pool().get(MESSAGE_BYTES);
    let header = group.comm().start_receive(chunk, Some(from), MESSAGE_HEADER).map_err(failed)?;
    let header = Mutex::new(header);
    let look = || Ok(if lock(&header).test()? { Advance::Done } else { Advance::Idle });
    drive(group, tag, look, || vec![from])?;
    let header = header.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner).take();
    let expected = call(tag, bytes.len());
    compare(&expected, false, header.bytes(), process.rank(), group.world_rank(from)).map_err(failed)?;
    if bytes.len() <= INLINE_BYTES {
        bytes.copy_from_slice(&header.bytes()[HEADER_BYTES..]);
        if from != group.rank() {
            group.count_received(bytes.len());
        }
        return Ok(());
    }
    let mut lane = Lane::whole(from, MESSAGE_DATA, bytes.len());
    lane.open(group).map_err(failed)?;
    let look = || {
        let mut moved = false;
        while let Some((range, chunk)) = lane.take(group)? {
            bytes[range].copy_from_slice(chunk.bytes());
            moved = true;
        }
        Ok(if lane.is_done() { Advance::Done } else { Advance::moved(moved) })
    };
    drive(group, tag, look, || vec![from])
}
