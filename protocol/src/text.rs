//! Documents as one line of text that survives mail, chat and a terminal: a prefix that says what it is, base64url
//! without padding, and four check bytes, so that a cut-off or mistyped line is told from a forged one.

use data_encoding::BASE64URL_NOPAD;

use crate::codec::{self, CodecError, Wire};
use crate::ids::Digest;

/// Why a line of text is not the document that it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TextError {
    /// It begins with something else.
    #[error("it must begin with '{0}'")]
    Prefix(&'static str),
    /// Characters that cannot be in it.
    #[error("it holds characters that do not belong there, or was cut off; copy the whole line again")]
    Encoding,
    /// The check bytes do not fit.
    #[error("its check digits do not fit: it was cut off or mistyped; copy the whole line again")]
    Checksum,
    /// Whole, but not what this build reads.
    #[error(transparent)]
    Codec(#[from] CodecError),
}

/// Writes `value` as `prefix` + text.
pub(crate) fn to_line<T: Wire>(prefix: &'static str, value: &T) -> String {
    let mut bytes = codec::encode(value);
    let check = check_bytes(prefix, &bytes);
    bytes.extend_from_slice(&check);
    format!("{prefix}{}", BASE64URL_NOPAD.encode(&bytes))
}

/// Reads a line written by [`to_line`]; white space around it and line breaks within (mail programs) are passed over.
///
/// # Errors
/// [`TextError`], each with what to do.
pub(crate) fn from_line<T: Wire>(prefix: &'static str, line: &str) -> Result<T, TextError> {
    // base64 is 4/3 of the bytes; twice the limit leaves room for white space and still bounds the work.
    if line.len() > 2 * T::MAX + 64 {
        return Err(CodecError::TooLarge { len: line.len(), max: T::MAX }.into());
    }
    let text: String = line.chars().filter(|c| !c.is_whitespace()).collect();
    let text = text.strip_prefix(prefix).ok_or(TextError::Prefix(prefix))?;
    let bytes = BASE64URL_NOPAD.decode(text.as_bytes()).map_err(|_| TextError::Encoding)?;
    let (body, check) = bytes.split_last_chunk::<4>().ok_or(TextError::Encoding)?;
    if *check != check_bytes(prefix, body) {
        return Err(TextError::Checksum);
    }
    Ok(codec::decode(body)?)
}

fn check_bytes(prefix: &str, body: &[u8]) -> [u8; 4] {
    let digest = Digest::of("willcall 2026-11 check digits", &[prefix.as_bytes(), body]);
    let [a, b, c, d, ..] = *digest.as_bytes();
    [a, b, c, d]
}
