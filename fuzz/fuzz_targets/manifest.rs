//! A manifest steers arithmetic over offsets and lengths: once checked, none of it may overflow or disagree.
#![no_main]

use libfuzzer_sys::fuzz_target;
use protocol::NetworkId;
use protocol::codec::{self, Wire};
use protocol::manifest::{Manifest, Segment, content_root};

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
    if let Some(segment) = take::<Segment>(bytes) {
        let _ = content_root(&segment.values, segment.values.len() as u64 * 65_536, 65_536);
    }
    let Some(manifest) = take::<Manifest>(bytes) else { return };
    let network: NetworkId = manifest.network;
    if manifest.check(network).is_ok() {
        let last = manifest.chunks() - 1;
        assert_eq!(manifest.chunk_offset(last) + u64::from(manifest.chunk_len(last)), manifest.length);
        assert_eq!(manifest.chunk_len(last + 1), 0);
        assert_eq!(manifest.segment_chunks(manifest.segment_count() - 1).end, manifest.chunks());
    }
    let _ = manifest.verifies(0, &[0; 32], bytes);
});
