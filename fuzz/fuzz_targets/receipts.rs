//! Receipts and what they are made of come from parties that gain by lying.
#![no_main]

use libfuzzer_sys::fuzz_target;
use protocol::Signed;
use protocol::codec::{self, Wire};
use protocol::ids::PeerId;
use protocol::receipt::{Ack, Completion, Mark, Receipt, ReceiptBatch, SealedBatch};
use protocol::serving::ServeAccount;
use protocol::settling::{Counting, Layout};

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
    take::<Signed<Completion>>(bytes);
    take::<Signed<Mark>>(bytes);
    take::<Signed<SealedBatch>>(bytes);
    take::<Receipt>(bytes);
    take::<ReceiptBatch>(bytes);
    take::<ServeAccount>(bytes);
    take::<Counting>(bytes);
    if let Some(ack) = take::<Ack>(bytes) {
        let layout = Layout { length: 1 << 36, chunk_size: 65_536 };
        let mut counting = Counting::default();
        counting.accept(&layout, PeerId::from_bytes([1; 32]), &ack.chunks);
        let paid = counting.close(&layout, u64::MAX, u64::MAX);
        assert_eq!(paid.lines.iter().map(|line| line.parts).sum::<u128>(), paid.parts);
    }
});
