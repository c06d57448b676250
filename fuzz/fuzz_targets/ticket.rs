//! A ticket is the first thing that a stranger shows to a seeder, and a file that people pass around.
#![no_main]

use libfuzzer_sys::fuzz_target;
use protocol::codec::{self, Wire};
use protocol::ticket::{Ticket, TicketEnvelope};

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
    if let Some(ticket) = take::<Ticket>(bytes) {
        // Cheap checks read what is not verified yet.
        let _ = (ticket.data.peek(), ticket.lease.peek());
        let signer = ticket.data.signer();
        let _ = ticket.data.verify(&signer);
    }
    take::<TicketEnvelope>(bytes);
    if let Ok(envelope) = TicketEnvelope::from_file_bytes(bytes) {
        assert_eq!(envelope.to_string().parse::<TicketEnvelope>().as_ref(), Ok(&envelope));
    }
});
