//! What a rank says before it brings data: which call this is. Ranks that say different things have come apart.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use crate::call::Operation;
use crate::error::{Error, Result};
use crate::tag::Tag;

/// The size of a header. A multiple of 8, so that what follows it is aligned for any number.
pub(super) const HEADER_BYTES: usize = 96;
/// The largest first message: header and small data in one. Below the size up to which Open MPI sends in shared memory
/// without a handshake (4 KiB with its own header).
pub(super) const MESSAGE_BYTES: usize = 4032;
/// The data that fits beside a header.
pub(super) const INLINE_BYTES: usize = MESSAGE_BYTES - HEADER_BYTES;

const SITE_BYTES: usize = 56;
/// Says that the two programs speak the same format.
const MAGIC: u32 = 0x5444_4d01;

/// One call as one rank sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Call {
    pub(super) tag: Tag,
    /// `None` for a message between two ranks.
    pub(super) operation: Option<Operation>,
    /// Elements brought; compared, unless the call allows any.
    pub(super) length: usize,
    /// Which call of this communicator it is.
    pub(super) sequence: u64,
}

const OPERATIONS: [Operation; 15] = [
    Operation::AllReduceSumF32,
    Operation::AllReduceSumF64,
    Operation::AllReduceMaxF64,
    Operation::AllReduceSumBf16,
    Operation::ReduceScatterSumF32,
    Operation::ReduceScatterSumBf16,
    Operation::AllGather,
    Operation::AllGatherVaried,
    Operation::AllToAll,
    Operation::Barrier,
    Operation::Agree,
    Operation::StartAllGatherF32,
    Operation::StartReduceScatterSumF32,
    Operation::StartAllReduceSumF32,
    Operation::Split,
];
const MESSAGE: u16 = 0xfffe;
const BROADCAST: u16 = 0xffff;

fn encode_operation(operation: Option<Operation>) -> (u16, u32) {
    match operation {
        None => (MESSAGE, 0),
        Some(Operation::Broadcast { root }) => (BROADCAST, root as u32),
        Some(other) => {
            let index = OPERATIONS.iter().position(|known| *known == other);
            (index.unwrap_or(OPERATIONS.len()) as u16, 0)
        }
    }
}

fn decode_operation(code: u16, root: u32) -> Option<Operation> {
    match code {
        BROADCAST => Some(Operation::Broadcast { root: root as usize }),
        code => OPERATIONS.get(usize::from(code)).copied(),
    }
}

/// Writes `call` to the first [`HEADER_BYTES`] of `bytes`.
pub(super) fn encode(call: &Call, bytes: &mut [u8]) {
    let (code, root) = encode_operation(call.operation);
    let site = call.tag.site.as_bytes();
    let kept = &site[..site.len().min(SITE_BYTES)];
    bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
    bytes[4..6].copy_from_slice(&code.to_le_bytes());
    bytes[6..8].copy_from_slice(&(site.len() as u16).to_le_bytes());
    bytes[8..12].copy_from_slice(&root.to_le_bytes());
    bytes[12..16].copy_from_slice(&(call.sequence as u32).to_le_bytes());
    bytes[16..24].copy_from_slice(&call.tag.sequence.to_le_bytes());
    bytes[24..32].copy_from_slice(&(call.length as u64).to_le_bytes());
    bytes[32..40].fill(0);
    bytes[40..HEADER_BYTES].fill(0);
    bytes[40..40 + kept.len()].copy_from_slice(kept);
}

/// Compares what a peer has sent with what this rank is doing, and returns the peer's length.
///
/// `rank` and `peer` are ranks of the world, for the message.
///
/// # Errors
/// [`Error::Desync`], [`Error::OperationMismatch`], [`Error::LengthMismatch`]; [`Error::Backend`] for bytes that are no
/// header.
pub(super) fn compare(call: &Call, any_length: bool, bytes: &[u8], rank: usize, peer: usize) -> Result<usize> {
    let foreign = |text: &str| Error::Backend { rank, library: "MPI", code: 0, text: format!("rank {peer} {text}") };
    if bytes.len() < HEADER_BYTES || bytes[..4] != MAGIC.to_le_bytes() {
        return Err(foreign("speaks another protocol; all ranks must run the same binary"));
    }
    let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
    let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;

    let mut expected = [0; HEADER_BYTES];
    encode(call, &mut expected);
    let same_site = bytes[6..8] == expected[6..8] && bytes[40..HEADER_BYTES] == expected[40..];
    let tag_sequence = u64_at(16);
    if !same_site || tag_sequence != call.tag.sequence {
        let kept = usize::from(u16_at(6)).min(SITE_BYTES);
        let site = intern(&String::from_utf8_lossy(&bytes[40..40 + kept]));
        return Err(Error::Desync { rank, called: call.tag, peer, peer_called: Tag::new(site, tag_sequence) });
    }
    let (peer_operation, operation) = (decode_operation(u16_at(4), u32_at(8)), call.operation);
    if peer_operation != operation {
        let (Some(operation), Some(peer_operation)) = (operation, peer_operation) else {
            return Err(foreign("sent a message where a call was due; all ranks must run the same plan"));
        };
        return Err(Error::OperationMismatch { tag: call.tag, rank, operation, peer, peer_operation });
    }
    let peer_length = u64_at(24) as usize;
    if peer_length != call.length && !any_length {
        return Err(Error::LengthMismatch { tag: call.tag, rank, length: call.length, peer, peer_length });
    }
    if u32_at(12) != call.sequence as u32 {
        return Err(foreign("is another number of calls away; all ranks must run the same plan"));
    }
    Ok(peer_length)
}

/// A site name that came over the wire. There are few, and one is only made when a run fails.
fn intern(site: &str) -> &'static str {
    static KNOWN: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(found) = known.get(site) {
        return found;
    }
    let kept: &'static str = Box::leak(site.to_owned().into_boxed_str());
    known.insert(kept);
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    const CALL: Call = Call {
        tag: Tag { site: "gradients", sequence: 7 },
        operation: Some(Operation::AllReduceSumF32),
        length: 12,
        sequence: 40,
    };

    fn meet(peer: &Call) -> Result<usize> {
        let mut bytes = [0xaa; HEADER_BYTES];
        encode(peer, &mut bytes);
        compare(&CALL, false, &bytes, 0, 3)
    }

    #[test]
    fn equal_calls_meet_and_others_are_named() {
        assert_eq!(meet(&CALL).unwrap(), 12);
        let other = meet(&Call { tag: Tag::new("gradients", 8), ..CALL }).unwrap_err();
        assert!(
            other.to_string().starts_with("rank 0 called gradients[7] while rank 3 called gradients[8]"),
            "{other}"
        );
        let other = meet(&Call { tag: Tag::new("loss", 7), ..CALL }).unwrap_err();
        assert!(matches!(other, Error::Desync { peer_called: Tag { site: "loss", sequence: 7 }, .. }), "{other}");
        for peer in OPERATIONS.into_iter().skip(1).chain([Operation::Broadcast { root: 5 }]) {
            let other = meet(&Call { operation: Some(peer), ..CALL }).unwrap_err();
            assert!(
                matches!(other, Error::OperationMismatch { peer_operation, .. } if peer_operation == peer),
                "{other}"
            );
        }
        assert!(meet(&Call { operation: None, ..CALL }).is_err());
        let other = meet(&Call { length: 13, ..CALL }).unwrap_err();
        assert!(matches!(other, Error::LengthMismatch { peer_length: 13, .. }), "{other}");
        assert!(meet(&Call { sequence: 41, ..CALL }).is_err());
    }

    #[test]
    fn roots_and_long_sites_count() {
        let call = Call { operation: Some(Operation::Broadcast { root: 1 }), ..CALL };
        let mut bytes = [0; HEADER_BYTES];
        encode(&Call { operation: Some(Operation::Broadcast { root: 2 }), ..CALL }, &mut bytes);
        assert!(matches!(compare(&call, false, &bytes, 0, 1), Err(Error::OperationMismatch { .. })));
        let long = "a site with a name that is much longer than the room that a header has for it";
        encode(&Call { tag: Tag::new(long, 7), ..CALL }, &mut bytes);
        let error = compare(&CALL, false, &bytes, 0, 1).unwrap_err();
        assert!(matches!(error, Error::Desync { peer_called, .. } if long.starts_with(peer_called.site)), "{error}");
        assert!(compare(&CALL, false, &bytes[..10], 0, 1).unwrap_err().to_string().contains("same binary"));
    }
}
