//! Every message that a peer can send on a stream, in a call or through the mesh.
#![no_main]

use libfuzzer_sys::fuzz_target;
use protocol::api::*;
use protocol::codec::{self, Wire};
use protocol::deliver::{ClientMessage, SeederMessage};

/// What a decoder takes, it writes in one form, which it takes again.
fn take<T: Wire>(bytes: &[u8]) -> Option<T> {
    let value = codec::decode::<T>(bytes).ok()?;
    let written = codec::encode(&value);
    assert!(written.len() <= T::MAX, "grew past its limit");
    let again = codec::decode::<T>(&written).map(|value| codec::encode(&value));
    assert_eq!(again.as_ref(), Ok(&written));
    Some(value)
}

fuzz_target!(|bytes: &[u8]| {
    take::<ClientMessage>(bytes);
    take::<SeederMessage>(bytes);
    take::<SalesRequest>(bytes);
    take::<SalesResponse>(bytes);
    take::<MailboxRequest>(bytes);
    take::<MailboxResponse>(bytes);
    take::<MeshRequest>(bytes);
    take::<MeshResponse>(bytes);
    take::<SeederRequest>(bytes);
    take::<SeederResponse>(bytes);
    take::<News>(bytes);
    take::<GossipedBatch>(bytes);
});
