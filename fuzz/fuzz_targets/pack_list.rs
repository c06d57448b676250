//! The list of files in a pack decides where a client writes: what passes its checks must not leave the folder.
#![no_main]

use libfuzzer_sys::fuzz_target;
use protocol::codec::{self, Wire};
use protocol::pack::{EntryKind, FileList, check_link, read_header};

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
    if let Some(header) = bytes.first_chunk::<16>() {
        let _ = read_header(header);
    }
    let Some(list) = take::<FileList>(bytes) else { return };
    let _ = (list.total_size(), list.file_count());
    if list.check().is_ok() {
        for entry in &list.entries {
            assert!(!entry.path.starts_with('/') && entry.path.split('/').all(|part| !matches!(part, "" | "." | "..")));
            if let EntryKind::Link { target } = &entry.kind {
                check_link(&entry.path, target).unwrap();
            }
        }
    }
});
