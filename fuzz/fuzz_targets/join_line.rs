//! A join line is pasted by people, from anywhere.
#![no_main]

use libfuzzer_sys::fuzz_target;
use protocol::codec::{self, Wire};
use protocol::trust::JoinLine;

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
    take::<JoinLine>(bytes);
    if let Ok(text) = std::str::from_utf8(bytes) {
        for text in [text.to_owned(), format!("willcall-join:{text}")] {
            if let Ok(join) = text.parse::<JoinLine>() {
                assert_eq!(join.to_string().parse::<JoinLine>(), Ok(join));
            }
        }
    }
});
